"""Bytes: records, frames, digests, signatures, invites and the TLS link, as docs/protocol.md has them."""
import datetime
import hashlib
import math
import os
import re
import select
import socket
import ssl
import struct
import tempfile
import time

import msgpack
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

VERSION = 1
HEADER = struct.Struct("<4sBBHIQQQ")
MAGIC = b"ITL1"
ZERO = bytes(32)


class Refused(Exception):
    """Something that came from outside is not what the document allows."""


# ---- records ------------------------------------------------------------------------------------

class Record(dict):
    """Fields by name, in the document's order."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Codec:
    def __init__(self, document):
        self.records = document.records
        self._wide, self._narrow = msgpack.Packer(), msgpack.Packer(use_single_float=True)

    def encode(self, name, value):
        out = []
        self._encode(name, value, out)
        return b"".join(out)

    def _encode(self, name, value, out):
        fields = self.records[name]
        if len(value) != len(fields):
            raise Refused(f"{name}: {len(value)} fields, not {len(fields)}")
        out.append(self._wide.pack_array_header(len(fields)))
        for f in fields:
            x = value[f.name]
            if f.kind == "list":
                self._limit(name, f, len(x))
                out.append(self._wide.pack_array_header(len(x)))
                for item in x:
                    self._encode(f.record, item, out)
            else:
                self._check(name, f, x)
                out.append((self._narrow if f.kind == "f32" else self._wide).pack(x))

    def _limit(self, name, f, n):
        if n > f.max:
            raise Refused(f"{name}.{f.name}: {n}, at most {f.max}")

    def _check(self, name, f, x):
        where = f"{name}.{f.name}"
        if f.kind in ("u8", "u32", "u64", "i32"):
            least = -2**31 if f.kind == "i32" else 0
            if type(x) is not int or not least <= x <= f.max:
                raise Refused(f"{where}: {x!r} is no {f.kind} of at most {f.max}")
        elif f.kind in ("f32", "f64"):
            if type(x) is not float or not math.isfinite(x):
                raise Refused(f"{where}: {x!r} is no finite {f.kind}")
        elif f.kind == "str":
            if type(x) is not str or re.search("[\0-\x1f\x7f-\x9f]", x):
                raise Refused(f"{where}: no text without control characters")
            self._limit(name, f, len(x.encode()))
        elif type(x) is not bytes:
            raise Refused(f"{where}: no byte string")
        elif f.kind == "bytes":
            self._limit(name, f, len(x))
        elif len(x) != f.max:
            raise Refused(f"{where}: {len(x)} bytes, not {f.max}")

    def decode(self, name, data):
        """Only what encodes to the very same bytes again is accepted."""
        try:
            tree = msgpack.unpackb(data, raw=False, strict_map_key=True)
        except Exception as why:  # msgpack has its own kinds of error and Python's
            raise Refused(f"{name}: not msgpack: {why!r}") from None
        value = self._shape(name, tree)
        if self.encode(name, value) != data:
            raise Refused(f"{name}: not in canonical form")
        return value

    def _shape(self, name, tree):
        fields = self.records[name]
        if type(tree) is not list or len(tree) != len(fields):
            raise Refused(f"{name}: not an array of {len(fields)} fields")
        out = Record()
        for f, x in zip(fields, tree):
            if f.kind == "list":
                if type(x) is not list:
                    raise Refused(f"{name}.{f.name}: not an array")
                x = [self._shape(f.record, item) for item in x]
            out[f.name] = x
        return out


# ---- digests and signatures ----------------------------------------------------------------------

def digest(*parts):
    h = hashlib.blake2b(digest_size=32)
    for p in parts:
        h.update(p)
    return h.digest()


def leaf(index, *parts):
    return digest(b"\0" + index.to_bytes(8, "little"), *parts)


def node(left, right):
    return digest(b"\1", left, right)


def tree_root(leaves):
    level = list(leaves) or [ZERO]
    while len(level) > 1:
        level = [node(*level[i:i + 2]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    return level[0]


def path_leads(root, at, index, count, path):
    """Does the leaf `at`, number `index` of `count`, stand under `root`?"""
    path = list(path)
    while count > 1:
        sibling = index ^ 1
        if sibling < count:
            if not path:
                return False
            other = path.pop(0)
            at = node(other, at) if index & 1 else node(at, other)
        index, count = index // 2, (count + 1) // 2
    return not path and at == root


def signed_bytes(purpose, run, term, data):
    return b"intellect/1 " + purpose.encode() + b"\0" + run + term.to_bytes(8, "little") + data


def sign(private, purpose, run, term, data):
    return private.sign(signed_bytes(purpose, run, term, data))


def is_signed(key, purpose, run, term, data, signature):
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed_bytes(purpose, run, term, data))
    except (InvalidSignature, ValueError):
        return False
    return True


def record_is_signed(key, purpose, run, term, data):
    """Of a record whose last field is its signature."""
    return len(data) > 64 and is_signed(key, purpose, run, term, data[:-64] + bytes(64), data[-64:])


# ---- identities and invites ------------------------------------------------------------------------

def public_bytes(private):
    return private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def identity_load(path):
    with open(path, encoding="ascii") as f:
        m = re.fullmatch(r"intellect-identity-1 ([0-9a-f]{64})\n", f.read())
    if not m:
        raise Refused(f"{path} is no identity")
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(m[1]))


class Invite:
    def __init__(self, line):
        host, hexadecimal = r"(\[[0-9a-fA-F:.]+\]|[^\[\]/:#\s]+)", "([0-9a-fA-F]{64})"
        m = re.fullmatch(rf"\s*intellect://{host}:([0-9]+)/{hexadecimal}#{hexadecimal}\s*", line)
        if not m or not 1 <= int(m[2]) <= 65535:
            raise Refused("that is no invite")
        self.host, self.port = m[1].strip("[]"), int(m[2])
        self.run, self.secret = bytes.fromhex(m[3]), bytes.fromhex(m[4])


# ---- links -------------------------------------------------------------------------------------------

def tls_context(private):
    """Python's ssl takes certificates from files only; nobody else may read this one."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "reader")])
    day = datetime.datetime(2000, 1, 1)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1)
                   .public_key(private.public_key()).not_valid_before(day)
                   .not_valid_after(day.replace(year=9999)).sign(private, None))
    pem = certificate.public_bytes(serialization.Encoding.PEM) + private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the key is checked by hand
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET
    context.set_alpn_protocols(["intellect/1"])
    fd, path = tempfile.mkstemp()
    try:
        os.write(fd, pem)
        context.load_cert_chain(path)
    finally:
        os.close(fd)
        os.unlink(path)
    return context


def certified_key(der):
    certificate = x509.load_der_x509_certificate(der)
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise Refused("the peer's key is not Ed25519")
    try:
        key.verify(certificate.signature, certificate.tbs_certificate_bytes)
    except InvalidSignature:
        raise Refused("the peer's certificate is not signed by its own key") from None
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


class Frame:
    def __init__(self, name, term, session, plan, message, payload):
        self.name, self.term, self.session, self.plan = name, term, session, plan
        self.message, self.payload = message, payload


class Closed(Exception):
    """The peer ended the connection."""


class Link:
    """One connection. Reading never waits; sending waits as long as `seconds` of connecting."""

    def __init__(self, document, codec, context, host, port, payload_max, seconds=10):
        self.document, self.codec, self.payload_max = document, codec, payload_max
        plain = socket.create_connection((host, port), timeout=seconds)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.tls = context.wrap_socket(plain)
        if self.tls.version() != "TLSv1.3" or self.tls.selected_alpn_protocol() != "intellect/1":
            raise Refused("the peer does not speak intellect/1 over TLS 1.3")
        self.key = certified_key(self.tls.getpeercert(binary_form=True))
        self.input = bytearray()
        self.ended = False
        self.seconds = seconds

    def fileno(self):
        return self.tls.fileno()

    def close(self):
        try:
            self.tls.close()
        except OSError:
            pass

    def send(self, name, message, term, session=0, plan=0):
        payload = self.codec.encode(name, message)
        self.tls.settimeout(self.seconds)
        self.tls.sendall(HEADER.pack(MAGIC, VERSION, self.document.numbers[name], 0, len(payload), term, session, plan)
                         + payload)

    def _read(self):
        """Everything that is there: TLS may hold more than the socket shows."""
        self.tls.settimeout(0)
        while not self.ended:
            try:
                data = self.tls.recv(1 << 18)
            except (ssl.SSLWantReadError, BlockingIOError):
                return
            except (ssl.SSLError, OSError):
                data = b""
            self.ended = not data
            self.input += data

    def frames(self):
        """Those that have come whole. Raises Refused for what breaks the rules, Closed after the last one."""
        self._read()
        while True:
            frame = self._take()
            if frame is None:
                break
            yield frame
        if self.ended:
            raise Closed("closed by the peer" + (" in the middle of a frame" if self.input else ""))

    def wait(self, seconds):
        """The next one. TimeoutError where none comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            select.select([self], [], [], 0.1)
            for frame in self.frames():
                return frame
        raise TimeoutError(f"no message within {seconds} s")

    def _take(self):
        if len(self.input) < HEADER.size:
            return None
        magic, version, number, reserved, length, term, session, plan = HEADER.unpack_from(self.input)
        if magic != MAGIC or version != VERSION or reserved:
            raise Refused("that is no frame of this protocol")
        if number not in self.document.types:
            raise Refused(f"a frame of unknown type {number}")
        name = self.document.types[number]
        if not 1 <= length <= self.payload_max:
            raise Refused(f"{name}: {length} bytes of payload, allowed are 1 to {self.payload_max}")
        if len(self.input) < HEADER.size + length:
            return None
        payload = bytes(self.input[HEADER.size:HEADER.size + length])
        del self.input[:HEADER.size + length]
        return Frame(name, term, session, plan, self.codec.decode(name, payload), payload)
