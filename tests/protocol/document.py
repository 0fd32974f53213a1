"""The tables of docs/protocol.md. What they say is what the reader does: nothing is taken from the C code."""
import re

FIELD = re.compile(r"`(\w+)` (?:\[(\w+)\]|(\w+))(?: <= (\d+))?( bytes)?")
WIDTH = {"u8": 2**8 - 1, "u32": 2**32 - 1, "u64": 2**64 - 1, "i32": 2**31 - 1, "f32": None, "f64": None,
         "digest": 32, "key": 32, "sig": 64}


class Field:
    """name; kind: one of WIDTH, "bytes", "str", or "list" of `record`; max: largest value, length or count."""

    def __init__(self, text):
        m = FIELD.fullmatch(text)
        if not m:
            raise ValueError(f"the document describes a field as {text!r}")
        name, record, kind, limit, is_bytes = m.groups()
        self.name, self.record, self.kind = name, record, "list" if record else kind
        if self.kind not in WIDTH and (limit is None or self.kind not in ("list", "bytes", "str")):
            raise ValueError(f"no kind or no limit: {text!r}")
        self.max = int(limit) if limit else WIDTH[self.kind]


class Document:
    def __init__(self, path):
        self.tables = {}  # heading of the section, heading of the first column: its rows as lists of cells
        self._read(path)
        self.records = {}  # name: [Field]; of a message in capitals
        self.types = {}    # number of a message: its name
        for name, fields in self.table("Inside messages and the ledger", "record"):
            self._add(name, fields)
        for number, name, fields in self.table("Messages", "type"):
            if int(number) in self.types:
                raise ValueError(f"two messages of type {number}")
            self.types[int(number)] = name
            self._add(name, fields)
        self.numbers = {name: number for number, name in self.types.items()}
        for name, fields in self.records.items():
            for f in fields:
                if f.kind == "list" and f.record not in self.records:
                    raise ValueError(f"{name} lists {f.record}, which is no record")
        self.kinds = {int(r[0]): (r[1], r[2].strip("`"), r[3]) for r in self.table("The ledger", "kind")}
        self.purposes = {r[0].strip("`") for r in self.table("Identities and signatures", "purpose")}
        self.codes = {int(r[0]): r[1] for r in self.table("Errors", "code")}
        self.phases = {r[0]: int(r[1]) for r in self.table("States", "phase")}
        self.codecs = {r[0]: int(r[1]) for r in self.table("The outer step", "codec")}
        self.payload_max = {r[0]: int(r[1].replace(",", "")) for r in self.table("Frames", "link")}
        self.vectors = {r[0]: r[1].strip("`") for r in self.table("Vectors", "vector")}

    def table(self, section, first_column):
        return self.tables[section, first_column]

    def _add(self, name, fields):
        if name in self.records:
            raise ValueError(f"{name} stands in the tables twice")
        self.records[name] = [Field(t) for t in fields.split(", ")]

    def _read(self, path):
        section, rows = None, None
        with open(path, encoding="utf-8") as f:
            for line in f:
                if line.startswith("#"):
                    section = line.lstrip("#").strip()
                if not line.startswith("|"):
                    rows = None
                    continue
                cells = [c.strip() for c in line.strip().strip("|").split("|")]
                if rows is None:
                    rows, columns = [], len(cells)
                    if (section, cells[0]) in self.tables:
                        raise ValueError(f"two tables in {section} begin with {cells[0]}")
                    self.tables[section, cells[0]] = rows
                elif not set(cells[0]) <= {"-"}:
                    if len(cells) != columns:
                        raise ValueError(f"{section}: {len(cells)} cells in a table of {columns}: {line}")
                    rows.append(cells)
