"""Where ranks of several machines meet: a group is formed there, steps are stopped from there, and nobody else is let in."""

from __future__ import annotations

import contextlib
import datetime
import pickle
import socket
import threading
import time
import types
import weakref
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayltx.distributed_worker.meeting_server import MeetingServer, Place, ServedStore
from rayltx.distributed_worker.step_control import StepControl
from rayltx.errors import DeviceError, RanksDisagree, StepCancelled

HERE = "127.0.0.1"


@pytest.fixture
def server():
    server = MeetingServer(HERE)
    yield server
    server.close()


def test_keys_are_seen_by_all_and_by_their_group_alone(server):
    group = server.begin_group()
    one, other = ServedStore(server.place, group, 5.0), ServedStore(server.place, group, 0.1)
    one.set("a", "1")
    one.set("b", b"\x00\xff")
    assert other.get("a") == b"1" and other.get("b") == b"\x00\xff"
    assert other.check(["a", "b"]) and not other.check(["a", "c"])
    assert [one.add("n", 2), other.add("n", 3), one.add("n", 0)] == [2, 5, 5]
    assert other.compare_set("a", "2", "3") == b"1" and other.compare_set("a", "1", "3") == b"3"
    assert one.delete_key("a") and not one.delete_key("a")
    with pytest.raises(RuntimeError, match="no rank said a within 0 s"):
        other.get("a")
    threading.Timer(0.3, one.set, ("late", "1")).start()
    other.wait(["late"], datetime.timedelta(seconds=30))
    assert other.clone().get("b") == b"\x00\xff"
    assert not ServedStore(server.place, server.begin_group(), 0.1).check(["b"])


def test_torch_can_use_all_of_it(server):
    """As it does: through a prefix, by names of its own."""
    store = ServedStore(server.place, server.begin_group(), 5.0)
    within = dist.PrefixStore("p", store)
    within.set("a", "1")
    assert within.get("a") == b"1" and within.num_keys() == 1
    assert within.clone().get("a") == b"1"
    assert within.delete_key("a") and within.num_keys() == 0


def _meet(rank, place, group, folder):
    store = ServedStore(place, group, 60.0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    pair = dist.new_group([0, 2])
    if rank in (0, 2):
        dist.all_reduce(total, group=pair)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(total, f"{folder}/{rank}")


@pytest.mark.slow
def test_a_group_and_groups_within_it_are_formed_there(server, tmp_path):
    mp.spawn(_meet, (server.place, server.begin_group(), str(tmp_path)), nprocs=3)
    assert [torch.load(tmp_path / str(rank)).item() for rank in range(3)] == [6.0, 3.0, 6.0]


def test_nobody_without_the_secret_is_let_in(server, caplog):
    stranger = Place(server.place.host, server.place.port, b"x" * 32)
    with pytest.raises(RuntimeError, match=r"cannot be reached.*rejected"):
        stranger.connect()
    for rubbish in (b"GET / HTTP/1.0\r\n\r\n", b"\x00\x00\x00\x04" + pickle.dumps(0), b"\xff" * 1000):
        with socket.create_connection((server.place.host, server.place.port)) as visitor:
            visitor.settimeout(30)
            visitor.recv(1000)  # the challenge
            visitor.sendall(rubbish)
            answered = b""
            with contextlib.suppress(OSError):  # it may have been sent away already
                visitor.shutdown(socket.SHUT_WR)
                while chunk := visitor.recv(1000):
                    answered += chunk
            assert b"WELCOME" not in answered
    silent = socket.create_connection((server.place.host, server.place.port))
    assert server.place.secret.hex() not in repr(server.place) and str(server.place.secret) not in repr(server.place)
    assert not ServedStore(server.place, server.begin_group(), 1.0).check(["a"]), "others are served meanwhile"
    silent.close()
    assert "without the secret" in caplog.text


def test_one_who_says_little_is_sent_away(server, monkeypatch):
    monkeypatch.setattr("rayltx.distributed_worker.meeting_server._PROVE_S", 1.0)
    for visitor in [socket.create_connection((server.place.host, server.place.port)) for _ in range(2)]:
        with visitor, pytest.raises(OSError):
            visitor.sendall((200).to_bytes(4, "big"))
            while True:  # a byte at a time
                visitor.sendall(b"x")
                time.sleep(0.1)


def test_many_strangers_keep_nobody_out(server, monkeypatch):
    monkeypatch.setattr("rayltx.distributed_worker.meeting_server._PROVE_S", 1.0)
    before = threading.active_count()
    strangers = [socket.create_connection((server.place.host, server.place.port)) for _ in range(60)]
    assert not ServedStore(server.place, server.begin_group(), 1.0).check(["a"])
    assert threading.active_count() <= before + 2 * 32 + 1
    for stranger in strangers:
        stranger.close()


def test_a_server_without_descriptors_goes_on(server, monkeypatch, caplog):
    accept, failed = server._socket.accept, []

    def failing():
        if len(failed) < 3:
            failed.append(1)
            raise OSError(24, "Too many open files")
        return accept()

    monkeypatch.setattr(
        server, "_socket", types.SimpleNamespace(accept=failing, shutdown=lambda how: None, close=lambda: None)
    )
    for _ in range(2):
        assert not ServedStore(server.place, server.begin_group(), 1.0).check(["a"])
    assert caplog.text.count("Too many open files") == 3


def test_one_who_says_nothing_is_sent_away(server, monkeypatch):
    monkeypatch.setattr("rayltx.distributed_worker.meeting_server._PROVE_S", 1.0)
    with socket.create_connection((server.place.host, server.place.port)) as visitor:
        visitor.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            while visitor.recv(1000):
                pass


def test_ranks_are_stopped_at_one_block(server):
    """Through pickles, as they reach ranks."""
    control = StepControl(2)
    shared = [pickle.loads(pickle.dumps(server.share(control))) for _ in range(2)]
    for rank in (0, 1):
        shared[rank].at_block(rank)
    assert control.blocks() == [1, 1]
    shared[0].at_block(0)
    control.cancel()
    shared[1].at_block(1)  # rank 0 is in it already
    with pytest.raises(StepCancelled, match="block 3"):
        shared[0].at_block(0)
    with pytest.raises(StepCancelled, match="block 3"):
        shared[1].at_block(1)


def test_a_rank_that_waits_for_rank_0_is_told_of_a_failure_and_of_the_end(server):
    control = StepControl(2)
    waiting, failing = (pickle.loads(pickle.dumps(server.share(control))) for _ in range(2))
    raised = []

    def wait():
        try:
            waiting.at_block(1)
        except RanksDisagree as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while control.blocks() != [0, 1]:
        time.sleep(0.01)
    failing.abort()
    thread.join(60)
    assert len(raised) == 1
    del control
    with pytest.raises(RanksDisagree, match="nobody waits for this step"):
        failing.at_block(0)


def test_what_a_rank_was_told_does_not_keep_its_step(server, monkeypatch):
    """The thread that answered may not run again for a while: it has the error still, which must not have the step."""
    may_go_on, control = threading.Event(), StepControl(2)

    class Unhurried(Connection):
        def send(self, what):
            super().send(what)
            if isinstance(what, Exception):
                may_go_on.wait(60)

    monkeypatch.setattr("rayltx.distributed_worker.meeting_server.Connection", Unhurried)
    rank = pickle.loads(pickle.dumps(server.share(control)))
    control.cancel()
    with pytest.raises(StepCancelled):
        rank.at_block(0)
    step = weakref.ref(control)
    del control
    is_kept = step() is not None
    may_go_on.set()
    assert not is_kept


def test_an_address_that_is_taken_is_told(server):
    with pytest.raises(DeviceError, match=rf"cannot meet at 127.0.0.1:{server.place.port}: .*choose an address"):
        MeetingServer(HERE, server.place.port)
    with pytest.raises(DeviceError, match=r"cannot meet at 127\.0\.0\.1:99999"):
        MeetingServer(HERE, 99999)
    for everywhere in ("", "0.0.0.0", "::"):
        with pytest.raises(DeviceError, match="it has to be one that each of them reaches this machine at"):
            MeetingServer(everywhere)


def test_an_address_of_the_newer_kind(monkeypatch):
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    server = MeetingServer("::1")
    store = ServedStore(server.place, server.begin_group(), 5.0)
    store.set("a", "1")
    assert store.get("a") == b"1"
    server.close()


def test_the_end_of_the_server_is_an_error_of_the_store(server):
    store = ServedStore(server.place, "group", 1.0)
    store.set("a", "1")
    server.close()
    for each in (store, ServedStore(server.place, "group", 1.0)):
        with pytest.raises(RuntimeError, match="cannot be reached"):
            each.check(["a"])


def test_a_rank_that_waits_for_rank_0_is_let_go_at_the_end(server):
    control, raised = StepControl(2), []
    waiting = pickle.loads(pickle.dumps(server.share(control)))

    def wait():
        with contextlib.suppress(RanksDisagree, RuntimeError):
            waiting.at_block(1)
        raised.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    while control.blocks() != [0, 1]:
        time.sleep(0.01)
    server.close()
    thread.join(60)
    assert raised
    while any(each.name == "rayltx-visitor" for each in threading.enumerate()):
        time.sleep(0.05)
