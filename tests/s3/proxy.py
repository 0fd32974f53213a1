#!/usr/bin/env python3
"""proxy.py PORT_FILE UPSTREAM_PORT - an HTTP proxy on 127.0.0.1 before an S3 server there, which makes what networks
and servers make of requests. Writes its port to PORT_FILE. Orders are requests to it:

  /__fault/WHICH/FAULT/COUNT   the next COUNT requests meet the fault: of a method, ANY, or ~TEXT: with TEXT in the path
  /__random/PERCENT/SEED       so many of all requests meet a fault drawn at random
  /__heal                      no more of either
  /__seen                      how many of which faults there were, as JSON

Faults: reset (of a request half read), stall (nothing comes), truncate (half of the answer), lost (the server does it,
the answer is lost), flip (one bit of the answer's body), 500, 503 (Retry-After: 1), 429, away (connection closed at once),
hold (the request is carried out 5 s later), skew (403, the clock is wrong), full (403, the quota is used up).
"""
import json
import random
import socket
import struct
import sys
import threading
import time

FAULTS = ["reset", "stall", "truncate", "lost", "500", "503", "429", "away"]  # the others only by order
REFUSALS = {"skew": b"RequestTimeTooSkewed", "full": b"QuotaExceeded"}
lock = threading.Lock()
orders = []  # [which, fault, count]
chance = 0
draw = random.Random(0)
seen = {}


def fault_for(method, path):
    with lock:
        fault = None
        for o in orders:
            if o[2] > 0 and (o[0] in (method, "ANY") or (o[0][0] == "~" and o[0][1:] in path)):
                o[2] -= 1
                fault = o[1]
                break
        else:
            if draw.random() * 100 < chance:
                fault = draw.choice(FAULTS)
        if fault:
            seen[fault] = seen.get(fault, 0) + 1
        return fault


def order(path):
    global chance, draw
    words = path.strip("/").split("/")
    with lock:
        if words[0] == "__fault":
            orders.append([words[1], words[2], int(words[3])])
        elif words[0] == "__heal":
            orders.clear()
            chance = 0
        elif words[0] == "__random":
            chance, draw = float(words[1]), random.Random(int(words[2]))
        return json.dumps(seen).encode()


def hang_up(client):
    """A reset, not an orderly end."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def read_head(client):
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65536)
        if not more:
            return None, None
        data += more
    return data.split(b"\r\n\r\n", 1)


def read_body(client, headers, body, at_most=None):
    length = int(headers.get("content-length", "0"))
    if headers.get("expect") and len(body) < length:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = length if at_most is None else min(length, at_most)
    parts = [body]
    have = len(body)
    while have < length:
        more = client.recv(1 << 20)
        if not more:
            return None
        parts.append(more)
        have += len(more)
    return b"".join(parts)


def ask(head, body, upstream):
    """The server's whole answer; connections are not kept, so its end is the end."""
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"expect:", b"connection:"))]
    with socket.create_connection(("127.0.0.1", upstream)) as server:
        server.sendall(b"\r\n".join(lines) + b"\r\nConnection: close\r\n\r\n" + body)
        answer = []
        while True:
            more = server.recv(1 << 20)
            if not more:
                return b"".join(answer)
            answer.append(more)


def serve(client, upstream):
    head, rest = read_head(client)
    if head is None:
        return client.close()
    method, path = head.decode("latin-1").split(" ", 2)[:2]
    headers = dict(line.split(": ", 1) for line in head.decode("latin-1").lower().split("\r\n")[1:] if ": " in line)
    if path.startswith("/__"):
        text = order(path)
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(text), text))
        return client.close()
    fault = fault_for(method, path)
    if fault == "away":
        return client.close()
    if fault == "reset":
        read_body(client, headers, rest, int(headers.get("content-length", "0")) // 2)
        return hang_up(client)
    if fault == "stall":
        client.settimeout(60)
        try:
            while client.recv(65536):
                pass
        except OSError:
            pass
        return client.close()
    body = read_body(client, headers, rest)
    if body is None:
        return client.close()
    if fault in ("500", "503", "429"):
        more = b"Retry-After: 1\r\n" if fault == "503" else b""
        text = b"<Error><Code>SlowDown</Code></Error>" if method != "HEAD" else b""
        client.sendall(b"HTTP/1.1 %s Fault\r\n%sContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                       % (fault.encode(), more, len(text), text))
        return client.close()
    if fault in REFUSALS:
        text = b"<Error><Code>%s</Code></Error>" % REFUSALS[fault] if method != "HEAD" else b""
        client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(text), text))
        return client.close()
    if fault == "hold":
        time.sleep(5)
    answer = ask(head, body, upstream)
    if fault == "lost":
        return hang_up(client)
    if fault == "truncate":
        answer = answer[: len(answer) // 2]
    if fault == "flip" and not answer.endswith(b"\r\n\r\n"):
        answer = answer[:-1] + bytes([answer[-1] ^ 16])
    client.sendall(answer)
    client.close()


def guarded(client, upstream):
    try:
        serve(client, upstream)
    except OSError:
        client.close()


def main():
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    with open(sys.argv[1], "w") as f:
        f.write(str(listener.getsockname()[1]) + "\n")
    while True:
        client, _ = listener.accept()
        threading.Thread(target=guarded, args=(client, int(sys.argv[2])), daemon=True).start()


main()
