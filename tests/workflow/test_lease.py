"""One writer a run, on a disk, on S3, and in a store that offers no more than to keep what it is given."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from s3_server import BUCKET, s3_server

from pipelines import workflow
from pipelines.run_state import lease, lease_cells
from pipelines.run_state.lease import Lease, claim
from pipelines.run_state.lease_cells import NAME, PlainCell, cell_of
from pipelines.run_state.storage import RunStorage

HOLD = """
import sys, time
from pipelines.run_state.lease import claim
from pipelines.run_state.storage import RunStorage
with claim(RunStorage(sys.argv[1], "r1")):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(lease, "_DYING_S", 0.5)


@pytest.fixture(params=["disk", "s3", "plain"])
def storage(request, tmp_path, monkeypatch):
    if request.param == "disk":
        yield RunStorage(str(tmp_path / "runs"), "r1")
        return
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        if request.param == "plain":
            monkeypatch.setattr(lease, "cell_of", PlainCell)
            monkeypatch.setattr(lease_cells, "_SETTLE_S", 0.3)
        yield RunStorage(f"s3://{BUCKET}/runs", "r1")


def elsewhere(storage: RunStorage) -> bytes:
    """The lease as another machine's process has it."""
    about = json.loads(storage.read_bytes(NAME))
    content = json.dumps(about | {"host": "far", "machine": "far", "nonce": os.urandom(8).hex()}).encode()
    storage.write_bytes(NAME, content)
    return content


def test_the_second_writer_is_told_who_the_first_is(storage):
    with claim(storage) as first:
        host = re.escape(socket.gethostname())
        words = rf"run_id r1 is being written by process {os.getpid()} on {host}, since 20.* UTC: .*stop it"
        with pytest.raises(ValueError, match=words) as caught:
            claim(storage)
        assert "\n" not in str(caught.value)
        claim(RunStorage(storage.root, "r2"))  # another run is free
    assert not first.lost and not storage.exists(NAME), "given back"
    with claim(storage):
        pass


def test_it_is_given_back_when_the_body_raises(storage):
    with pytest.raises(KeyboardInterrupt), claim(storage):
        raise KeyboardInterrupt
    assert not storage.exists(NAME)


def test_it_is_renewed_while_it_is_held(storage):
    with claim(storage, renewed_every_s=0.1):
        before, deadline = storage.read_bytes(NAME), time.monotonic() + 20
        while storage.read_bytes(NAME) == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_renewal_that_is_slow_does_not_bring_it_back(tmp_path, monkeypatch):
    """The store takes longer to answer than the end waits for it."""
    storage, begun, go_on = RunStorage(str(tmp_path), "r1"), threading.Event(), threading.Event()
    monkeypatch.setattr(lease, "_LOOK_S", 0.1)
    held = claim(storage, renewed_every_s=0.05)
    swap = held._cell.swap

    def slow(before: bytes, content: bytes) -> bool:
        begun.set()
        assert go_on.wait(20)
        return swap(before, content)

    monkeypatch.setattr(held._cell, "swap", slow)
    with held:
        assert begun.wait(20)
    go_on.set()
    held._thread.join(20)
    assert not held._thread.is_alive() and not storage.exists(NAME) and not held.lost


def test_one_that_is_not_renewed_ends(storage):
    claim(storage)  # and never entered
    content = elsewhere(storage)
    started = time.monotonic()
    with claim(storage, expires_s=2.0):
        # A store's clock may count whole seconds.
        assert time.monotonic() - started > 0.9
        assert storage.read_bytes(NAME) != content


def test_one_that_another_machine_renews_is_refused(storage):
    claim(storage)
    elsewhere(storage)
    refused = threading.Event()

    def renew() -> None:
        while not refused.wait(1.0):  # again and again: the first look may come late on a busy machine
            elsewhere(storage)

    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(renew)
        try:
            with pytest.raises(ValueError, match=r"is being written by process \d+ on far, since"):
                claim(storage, expires_s=60.0)
        finally:
            refused.set()
        renewing.result()


@pytest.mark.parametrize("left", [b"", b"{", b"null", b"[]", b'{"pid": 1}'])
def test_what_a_power_cut_left_is_nobody_s(left, tmp_path):
    storage = RunStorage(str(tmp_path), "r1")
    storage.write_bytes(NAME, left)
    with claim(storage):
        pass


def test_of_many_at_once_one_gets_it(storage):
    count = 6
    together = threading.Barrier(count)

    def attempt(number: int) -> Lease | None:
        together.wait()
        try:
            return claim(storage)
        except ValueError:
            return None

    with ThreadPoolExecutor(count) as pool:
        taken = [one for one in pool.map(attempt, range(count)) if one is not None]
    assert len(taken) == 1


@pytest.fixture
def interruptible():
    """SIGINT as in a shell's foreground, also where the tests themselves run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def in_background():
    """SIGINT ignored, as in a shell's background, and SIGTERM raised in the main thread."""

    def terminate(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


@pytest.mark.parametrize("place", ["interruptible", "in_background"])
def test_who_has_lost_it_is_interrupted(storage, place, request):
    request.getfixturevalue(place)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), claim(storage, renewed_every_s=0.2) as held:
        for _ in range(240):  # again and again, since a renewal may fall between the other's look and write
            elsewhere(storage)
            time.sleep(0.5)
    assert time.monotonic() - started < 60, "at once"
    assert re.search(r"run_id r1 is written by process \d+ on far now.*it stops here", held.lost)
    assert storage.exists(NAME), "the other one's"


def test_one_that_somebody_deleted_is_taken_again(storage):
    with claim(storage, renewed_every_s=0.1) as held:
        storage.delete(NAME)
        deadline = time.monotonic() + 20
        while not storage.exists(NAME):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not held.lost


def test_an_answer_that_was_lost_on_the_way_loses_nothing(storage):
    held = claim(storage)
    held._content = b"as it was before the last renewal"
    held._renew()
    assert not held.lost


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_holder_on_this_machine_holds_it_while_it_lives(number, tmp_path, monkeypatch):
    monkeypatch.undo()
    storage = RunStorage(str(tmp_path), "r1")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.send_signal(number)
        if number == signal.SIGKILL:
            with claim(storage):  # at once, though nobody has waited for it yet
                pass
        else:
            with pytest.raises(ValueError, match=f"process {holder.pid} on"):
                claim(storage, expires_s=0.1)
    finally:
        holder.kill()
        holder.wait()


def test_a_process_that_has_got_the_number_of_a_dead_one_is_another(tmp_path):
    storage = RunStorage(str(tmp_path), "r1")
    claim(storage)
    about = json.loads(storage.read_bytes(NAME))
    storage.write_json(NAME, about | {"started": about["started"] - 100})
    with claim(storage):
        pass


def test_writers_on_one_disk_change_it_one_after_another(tmp_path):
    cell, rounds = cell_of(RunStorage(str(tmp_path), "r1")), 50

    def count(_: int) -> None:
        for _ in range(rounds):
            while True:
                before, _age = cell.read()
                if cell.swap(before, str(int(before or b"0") + 1).encode()):
                    break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert cell.read()[0] == str(4 * rounds).encode()


def test_the_workflow_refuses_to_be_the_second(tmp_path, capsys):
    storage = RunStorage(str(tmp_path), "r1")
    with claim(storage):
        arguments = ["fashion", "--run-id=r1", f"--storage-path={tmp_path}", "--stages", "train"]
        assert workflow.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: run_id r1 is being written by process") and "\n" not in error
    assert not (tmp_path / "r1" / "config.json").exists()
