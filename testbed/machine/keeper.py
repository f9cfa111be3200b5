# SPDX-License-Identifier: Apache-2.0
"""The keeper: one small process a rack that owns its QEMUs, their shared memory and its lock.

Made by :mod:`testbed.machine.keeper_main`, in a process of its own: standard library only and no
pathlib, as the start of every rack waits for its imports.

=========  ========================================================================================
fd 0       a socket to the owner, the process that started the rack. Until ``detach``, its end is
           the rack's end: everything is killed and the runtime folder removed.
fd 2       the run folder's ``keeper.log``.
fd 3       the rack's lock, taken by the owner (``flock``); held for the keeper's life, so a free
           lock means a dead rack.
=========  ========================================================================================

The owner's socket and every client of ``FOLDER/keeper.sock`` speak the same language, one JSON
line each way: ``{"id": 1, "call": NAME, ...}`` is answered by ``{"id": 1, "result": {...}}`` or
``{"id": 1, "error": {"kind": "launch"|"host"|"call", "message": ..., "process": ...,
"exit_status": ...}}``. Exit statuses are those of :mod:`subprocess`: minus the signal's number.

===========================  ======================================================================
begin {memory, processes}    owner only, once: make the memory, start the processes in order
start {process}              start one more, or one that has ended; memory of known names is kept
status {}                    who runs, who ended and how
subscribe {}                 status, and from then on ``{"event": "start"|"exit", ...}`` lines
memory {name}                the file descriptor in the keeper's own table, and the size
stop {name}, kill {name}     SIGTERM, SIGKILL
detach {}                    outlive the owner
shutdown {}                  kill everything, remove the folder, exit; the answer is end of file
===========================  ======================================================================

Just before its end the keeper tells everyone why: ``{"event": "end", "reason": ...}``.

``memory`` says of each name how many bytes of shared memory to make, or the path of the file that
it is (opened to be read: a saved machine's).

A process is ``{name, kind: "qemu"|"helper", argv, environment, folder, log, memory: [[fd, name]],
ready: path|"", ready_timeout_s}``. The next one starts when the ``ready`` path exists; a server
that makes it must listen before it renames its socket to that name. If the keeper itself is
killed, PR_SET_PDEATHSIG kills its children; the stale folder is removed by the next command
(:mod:`testbed.machine.registry`).
"""
# ruff: noqa: PTH110

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time

from testbed.machine.children import (
    CallError,
    Process,
    make_memory,
    open_memory,
    remove_runtime_folder,
)
from testbed.machine.nursery import Nursling

TYPE_CHECKING = False  # typing's, without the rest of it
if TYPE_CHECKING:
    from typing import Any

SOCKET = "keeper.sock"
LOCK_FD = 3
MAX_LINE_BYTES = 16 << 20  # a call
MAX_UNREAD_BYTES = 4 << 20  # answers and events that a client did not fetch: it is dropped
REAP_TIMEOUT_S = 10.0  # from SIGKILL to the end of a process that may be deep in the kernel
READY_PAUSE_S = 0.003  # a machine's start waits half of it, for its models


class Client:
    """One connection: lines in, lines out, never blocking the keeper."""

    def __init__(self, wire: socket.socket) -> None:
        wire.setblocking(False)
        self.wire = wire
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.subscribed = False

    def send(self, message: dict[str, object]) -> None:
        """Queue a line; the loop writes it when the client can take it."""
        self.outbox += json.dumps(message).encode() + b"\n"


class Batch:
    """Processes to be started one after the other, and who is told when all run."""

    def __init__(self, client: Client, call_id: object, names: list[str], first: bool) -> None:
        self.client = client
        self.call_id = call_id
        self.names = names
        self.first = first  # a rack that does not start is no rack: its end is the keeper's
        self.deadline_s: float | None = None  # of the one that was started and is not ready


class Keeper:
    """The event loop: children, clients, signals."""

    def __init__(self, name: str, folder: str, nursling: Nursling | None = None) -> None:
        self.name = name
        self.folder = folder
        self.nursling = nursling  # until a process has taken it
        self.detached = False
        self.begun = False
        self.ending = ""  # why, once it is so
        self.processes: dict[str, Process] = {}  # in the order of their start
        self.memory: dict[str, tuple[int, int]] = {}  # name → (fd, size in bytes)
        self.batches: list[Batch] = []
        self.selector = selectors.DefaultSelector()
        self.owner = Client(socket.socket(fileno=0))
        self.clients = [self.owner]
        self.selector.register(self.owner.wire, selectors.EVENT_READ, self.owner)
        self.wakeup = self._catch_signals()
        self.selector.register(self.wakeup, selectors.EVENT_READ)
        self.listener = self._listen()
        self.selector.register(self.listener, selectors.EVENT_READ)

    def _catch_signals(self) -> socket.socket:
        ours, handlers = socket.socketpair()
        for end in (ours, handlers):
            end.setblocking(False)
        signal.set_wakeup_fd(handlers.detach(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # the loop reads its number from the socket
        return ours

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.chdir(self.folder)  # its path may be longer than a socket's name can be
        listener.bind(SOCKET)
        listener.listen(16)
        listener.setblocking(False)
        return listener

    def run(self) -> None:
        """Serve until something ends the rack, then end it."""
        try:
            while not self.ending:
                pause = READY_PAUSE_S if self.batches else None
                for key, events in self.selector.select(pause):
                    if key.fileobj is self.wakeup:
                        self._on_signals()
                    elif key.fileobj is self.listener:
                        self._on_connection()
                    else:
                        self._on_client(key.data, events)
                self._advance()
                self._flush()
        finally:
            self._end()

    # -- what wakes it ---------------------------------------------------------------------------

    def _on_signals(self) -> None:
        for number in self.wakeup.recv(4096):
            if number != signal.SIGCHLD:
                self.ending = signal.Signals(number).name
        for process in self.processes.values():
            if process.reap():
                log(f"{process.name} ended with status {process.exit_status}")
                self._announce("exit", process)

    def _on_connection(self) -> None:
        try:
            wire, _ = self.listener.accept()
        except OSError:
            return  # it went away again, or no descriptor is free
        client = Client(wire)
        self.clients.append(client)
        self.selector.register(wire, selectors.EVENT_READ, client)

    def _on_client(self, client: Client, events: int) -> None:
        if client not in self.clients or not events & selectors.EVENT_READ:
            return
        try:
            data = client.wire.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.inbox += data
        if not data or len(client.inbox) > MAX_LINE_BYTES:
            self._drop(client)
            return
        *lines, client.inbox = client.inbox.split(b"\n")
        for line in lines:
            self._on_line(client, bytes(line))

    def _on_line(self, client: Client, line: bytes) -> None:
        call_id: object = None
        try:
            request = json.loads(line)
            call_id = request["id"]
            method = getattr(self, "_call_" + request["call"], None)
            if method is None:
                raise CallError("call", f"no such call: {request['call']}")
            result = method(client, request)
        except CallError as error:
            client.send({"id": call_id, "error": error.fields})
        except OSError as error:
            client.send({"id": call_id, "error": {"kind": "host", "message": str(error)}})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"not understood: {type(error).__name__}: {error}"
            client.send({"id": call_id, "error": {"kind": "call", "message": message}})
        else:
            if result is not None:
                client.send({"id": call_id, "result": result})

    def _drop(self, client: Client) -> None:
        self.selector.unregister(client.wire)
        client.wire.close()
        self.clients.remove(client)
        if client is self.owner and not self.detached:
            self.ending = "its owner is gone"

    def _announce(self, event: str, process: Process) -> None:
        for client in self.clients:
            if client.subscribed:
                client.send({"event": event, **process.status()})

    def _flush(self) -> None:
        for client in list(self.clients):
            try:
                if client.outbox:
                    del client.outbox[: client.wire.send(client.outbox)]
            except BlockingIOError:
                pass
            except OSError:
                client.outbox.clear()  # its end of file follows
            if len(client.outbox) > MAX_UNREAD_BYTES:
                self._drop(client)
                continue
            interest = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.outbox else 0)
            self.selector.modify(client.wire, interest, client)

    # -- starting, in order ----------------------------------------------------------------------

    def _advance(self) -> None:
        """Start what can be started now; a failure is told to whoever asked."""
        while self.batches:
            batch = self.batches[0]
            try:
                if not self._step(batch):
                    return
                answer: dict[str, object] = {"result": self.status()}
            except (CallError, OSError) as error:
                fields = getattr(error, "fields", {"kind": "host", "message": str(error)})
                answer = {"error": fields}
                log(f"start failed: {error}")
                if batch.first:
                    self.ending = "it did not start"
            del self.batches[0]
            self._end_nursling()  # who needs it was in the first batch
            batch.client.send({"id": batch.call_id, **answer})

    def _step(self, batch: Batch) -> bool:
        """True when all of the batch run and are ready."""
        while batch.names:
            process = self.processes[batch.names[0]]
            if batch.deadline_s is None:
                process.start(self.memory, self.nursling)
                if self.nursling is not None and process.pid == self.nursling.pid:
                    self.nursling = None
                log(f"{process.name} started, pid {process.pid}")
                self._announce("start", process)
                batch.deadline_s = time.monotonic() + process.spec["ready_timeout_s"]
            if not self._ready(process, batch.deadline_s):
                return False
            batch.deadline_s = None
            del batch.names[0]
        return True

    def _end_nursling(self) -> None:
        nursling, self.nursling = self.nursling, None
        if nursling is not None:
            nursling.end()

    def _ready(self, process: Process, deadline_s: float) -> bool:
        ready = process.spec["ready"]
        if not ready or os.path.exists(ready):
            return True
        if not process.running:
            message = f"{process.name} ended before it was ready"
        elif time.monotonic() > deadline_s:
            message = f"{process.name} was not ready within {process.spec['ready_timeout_s']} s"
            process.signal(signal.SIGKILL)
        else:
            return False
        status = process.exit_status
        raise CallError("launch", message, process=process.name, exit_status=status)

    # -- calls -----------------------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """What `ps` shows."""
        return {
            "rack": self.name,
            "pid": os.getpid(),
            "detached": self.detached,
            "starting": bool(self.batches) or not self.begun,
            "processes": [process.status() for process in self.processes.values()],
            "memory": {name: size for name, (_, size) in self.memory.items()},
        }

    def _call_begin(self, client: Client, request: dict[str, Any]) -> None:
        if client is not self.owner or self.begun:
            raise CallError("call", "begin is the owner's first call, once")
        self.begun = True
        try:
            for name, wanted in request["memory"].items():
                make = open_memory if isinstance(wanted, str) else make_memory
                fd = make(name, wanted)
                self.memory[name] = (fd, os.fstat(fd).st_size)
        except OSError as error:
            self.ending = "no memory"
            raise CallError("host", f"no memory '{name}': {error}") from error
        for spec in request["processes"]:
            self.processes[spec["name"]] = Process(spec)
        self.batches.append(Batch(client, request["id"], list(self.processes), first=True))

    def _call_start(self, client: Client, request: dict[str, Any]) -> None:
        process = Process(request["process"])
        old = self.processes.get(process.name)
        if old is not None and (old.running or not old.pid):
            raise CallError("call", f"{process.name} runs already")
        for _, name in process.spec["memory"]:
            if name not in self.memory:
                raise CallError("call", f"no such memory: {name}")
        self.processes[process.name] = process
        self.batches.append(Batch(client, request["id"], [process.name], first=False))

    def _call_status(self, _client: Client, _request: dict[str, Any]) -> dict[str, object]:
        return self.status()

    def _call_subscribe(self, client: Client, _request: dict[str, Any]) -> dict[str, object]:
        client.subscribed = True
        return self.status()

    def _call_memory(self, _client: Client, request: dict[str, Any]) -> dict[str, object]:
        if request["name"] not in self.memory:
            raise CallError("call", f"no such memory: {request['name']}")
        fd, size_bytes = self.memory[request["name"]]
        return {"fd": fd, "size_bytes": size_bytes}

    def _call_stop(self, _client: Client, request: dict[str, Any]) -> dict[str, object]:
        return self._signal(request["name"], signal.SIGTERM)

    def _call_kill(self, _client: Client, request: dict[str, Any]) -> dict[str, object]:
        return self._signal(request["name"], signal.SIGKILL)

    def _signal(self, name: str, number: int) -> dict[str, object]:
        if name not in self.processes:
            raise CallError("call", f"no such process: {name}")
        self.processes[name].signal(number)
        return {}

    def _call_detach(self, _client: Client, _request: dict[str, Any]) -> dict[str, object]:
        self.detached = True
        log("detached from its owner")
        return {}

    def _call_shutdown(self, _client: Client, _request: dict[str, Any]) -> None:
        self.ending = "asked to"

    # -- the end ---------------------------------------------------------------------------------

    def _end(self) -> None:
        """Kill, reap, remove; the last answers and the end of file tell the clients."""
        reason = self.ending or "a fault of its own, see keeper.log"
        log(f"ends: {reason}")
        self._end_nursling()
        for process in reversed(self.processes.values()):
            process.signal(signal.SIGKILL)
        deadline_s = time.monotonic() + REAP_TIMEOUT_S
        while left := [p.name for p in self.processes.values() if p.running and not p.reap()]:
            if time.monotonic() > deadline_s:
                log(f"still not dead after SIGKILL: {left}")
                break
            time.sleep(READY_PAUSE_S)
        self.listener.close()
        remove_runtime_folder(self.folder)
        for client in self.clients:
            client.send({"event": "end", "reason": reason})
        self._flush()


def log(text: str) -> None:
    """One line to the run folder's keeper.log; a full disk must not stop the keeper."""
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%H:%M:%S')} {text}\n".encode())
