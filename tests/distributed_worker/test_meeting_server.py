"""Where ranks of several machines meet: a group is formed there, steps are stopped from there, and nobody else is let in."""

from __future__ import annotations

import contextlib
import datetime
import pickle
import socket
import threading
import time

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
            visitor.shutdown(socket.SHUT_WR)
            answered = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := visitor.recv(1000):
                    answered += chunk
            assert b"WELCOME" not in answered
    silent = socket.create_connection((server.place.host, server.place.port))
    assert not ServedStore(server.place, server.begin_group(), 1.0).check(["a"]), "others are served meanwhile"
    silent.close()
    assert "without the secret" in caplog.text


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


def test_an_address_that_is_taken_is_told(server):
    with pytest.raises(DeviceError, match=rf"cannot meet at 127.0.0.1:{server.place.port}: .*choose an address"):
        MeetingServer(HERE, server.place.port)
    with pytest.raises(DeviceError, match=r"cannot meet at 127\.0\.0\.1:99999"):
        MeetingServer(HERE, 99999)


def test_the_end_of_the_server_is_an_error_of_the_store(server):
    store = ServedStore(server.place, "group", 1.0)
    store.set("a", "1")
    server.close()
    with pytest.raises(RuntimeError, match="cannot be reached"):
        ServedStore(server.place, "group", 1.0).check(["a"])
