# SPDX-License-Identifier: Apache-2.0
"""A program that behaves as QEMU does towards the testbed, as told by one JSON argument.

``report``   print what it was started with (descriptors, limits, session …) on standard output
``stderr``   text for standard error
``console``  [[pause_s, text], …] written to log/console.log
``exit``     [pause_s, status] after the console is written; otherwise it stays
``qmp``      serve qmp.sock; what it does with commands is in :func:`answer`
``late_s``   make qmp.sock only after that time
``mute``     accept connections and say nothing
``fickle``   end after the handshake
``touch``    [pause_s, name] make a socket of that name by rename
``child``    start a `sleep` and print its pid
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 2}}, "capabilities": []}}


def report() -> dict[str, Any]:
    fds = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            fds[entry.name] = str(entry.readlink())
        except FileNotFoundError:
            continue  # the listing's own
    umask = os.umask(0)
    return {
        "fds": fds,
        "folder": str(Path.cwd()),
        "leads_session": os.getsid(0) == os.getpid(),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "umask": umask,
        "environment": dict(os.environ),
    }


def event(name: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 7, "microseconds": 500000}}


def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines to send back."""
    name, arguments = request["execute"], request.get("arguments", {})
    call = {"id": request["id"]} if "id" in request else {}
    lines: list[dict[str, Any]] = [{"return": {}, **call}]
    match name:
        case "quit":
            os._exit(0)
        case "system_powerdown" if OPTIONS.get("acpi"):
            os._exit(0)
        case "hang":
            lines = []
        case "babble":
            lines = [{"error": "neither an id nor a description"}]
        case "no-such-command":
            error = {"class": "CommandNotFound", "desc": "The command has not been found"}
            lines = [{"error": error, **call}]
        case "echo":
            lines[0]["return"] = arguments
        case "noise":
            lines[:0] = [event("NOISE", {"n": n}) for n in range(3)]
        case "device_del" if arguments["id"] == "loved":
            lines.append(event("DEVICE_UNPLUG_GUEST_ERROR", {"device": "loved"}))
        case "device_del" if arguments["id"] != "stuck":
            lines.append(event("DEVICE_DELETED", {"path": "/machine/peripheral/other"}))
            lines.append(event("DEVICE_DELETED", {"device": arguments["id"]}))
    return lines


def listen(name: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(name + ".new")
    server.listen()
    Path(name + ".new").rename(name)
    return server


def serve_qmp() -> None:
    time.sleep(OPTIONS.get("late_s", 0))
    server = listen("qmp.sock")
    while True:
        wire, _ = server.accept()
        if OPTIONS.get("mute"):
            wire.recv(1)
            continue
        wire.sendall(json.dumps(GREETING).encode() + b"\r\n")
        for request in requests(wire):
            if request["execute"] == "hang-up":
                os._exit(3)
            for message in answer(request):
                wire.sendall(json.dumps(message).encode() + b"\r\n")
            if OPTIONS.get("fickle"):
                os._exit(0)


def requests(wire: socket.socket) -> Iterator[dict[str, Any]]:
    """JSON objects one after the other: clients of QMP need not send newlines."""
    text = ""
    while data := wire.recv(1 << 16):
        text = (text + data.decode()).lstrip()
        while text:
            try:
                request, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break  # the rest is on its way
            text = text[end:].lstrip()
            yield request


def main() -> None:
    if OPTIONS.get("report"):
        sys.stdout.write(json.dumps(report()) + "\n")
    if OPTIONS.get("child"):
        child = subprocess.Popen(["sleep", "1000"])
        sys.stdout.write(f"{child.pid}\n")
    sys.stdout.flush()
    sys.stderr.write(OPTIONS.get("stderr", ""))
    sys.stderr.flush()
    if "touch" in OPTIONS:
        pause_s, name = OPTIONS["touch"]
        time.sleep(pause_s)
        listen(name).detach()
    if OPTIONS.get("qmp"):
        threading.Thread(target=serve_qmp, daemon=True).start()
    if "console" in OPTIONS:
        with Path("log/console.log").open("a") as console:
            for pause_s, text in OPTIONS["console"]:
                time.sleep(pause_s)
                console.write(text)
                console.flush()
    pause_s, status = OPTIONS.get("exit", (1000, 0))
    time.sleep(pause_s)
    os._exit(status)


main()
