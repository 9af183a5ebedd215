"""Archives from a server on the loopback address: broken transfers, wrong content, hostile archives."""

import hashlib
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from harness import UserError
from harness.api.registry import Registry
from harness.api.task import Archive
from harness.data.download import download, fetch
from tests.harness.archives import GOOD, NAME, Server, packed


def test_brought_verified_unpacked_once(tmp_path):
    with Server(GOOD) as server:
        place = fetch(server.archive, tmp_path / "data")
        assert sorted(path.name for path in place.rglob("*") if path.is_file()) == ["a.nii.gz", "dataset.json"]
        assert [path.name for path in (tmp_path / "data").iterdir()] == [NAME]
        assert fetch(server.archive, tmp_path / "data") == place
        assert len(server.ranges) == 1


@pytest.mark.parametrize("breaks", [[1000], [1000, 0, 50_000], [299_000, 1]])
def test_a_broken_transfer_goes_on_where_it_stopped(breaks, tmp_path):
    with Server(GOOD, breaks) as server:
        fetch(server.archive, tmp_path)
        done = 0
        for asked, sent in zip(server.ranges[1:], breaks, strict=True):
            done += sent
            assert asked == (f"bytes={done}-" if done else None)


def test_an_interrupted_fetch_goes_on(tmp_path):
    (tmp_path / f"{NAME}.tar.part").write_bytes(GOOD[:1234])
    with Server(GOOD) as server:
        fetch(server.archive, tmp_path)
        assert server.ranges == ["bytes=1234-"]


def test_a_whole_part_needs_no_transfer(tmp_path):
    (tmp_path / f"{NAME}.tar.part").write_bytes(GOOD)
    with Server(GOOD) as server:
        assert fetch(server.archive, tmp_path).is_dir()


def test_a_server_that_cannot_resume_starts_again(tmp_path):
    with Server(GOOD, [5000], resumes=False) as server:
        assert fetch(server.archive, tmp_path).is_dir()


def test_a_server_that_always_breaks_is_given_up_and_what_came_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.data.download.PAUSE_S", 0.01)
    with Server(GOOD, [5000] + [0] * 10) as server, pytest.raises(UserError, match=r"5 times; 0\.0 MiB are kept in"):
        fetch(server.archive, tmp_path)
    assert (tmp_path / f"{NAME}.tar.part").stat().st_size == 5000


def test_without_a_sum_an_earlier_part_is_not_trusted(tmp_path):
    """It may be of another address, and nothing would tell."""
    for part in (b"x" * 1000, b"x" * (len(GOOD) + 1000)):
        (tmp_path / "w.pt.part").write_bytes(part)
        with Server(GOOD) as server:
            download(server.archive.url, tmp_path / "w.pt", "sha256", "")
        assert (tmp_path / "w.pt").read_bytes() == GOOD


def test_wrong_content_is_removed(tmp_path):
    with Server(GOOD) as server, pytest.raises(UserError, match="expected 0000"):
        fetch(Archive(server.archive.url, "0000", NAME), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_not_found_is_said_at_once(tmp_path):
    with Server(GOOD, status=404) as server:
        with pytest.raises(UserError, match="answers 404"):
            fetch(server.archive, tmp_path)
        assert len(server.ranges) == 1


def test_no_server(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr("harness.data.download.time.sleep", pauses.append)
    with pytest.raises(UserError, match="5 times"):
        fetch(Archive("http://127.0.0.1:9/x.tar", "0", NAME), tmp_path)
    assert pauses == [1, 2, 4, 8]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "/etc/passwd"])
def test_only_web_addresses(url, tmp_path):
    with pytest.raises(UserError, match=r"begins with https://"):
        fetch(Archive(url, "0", NAME), tmp_path)


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def device(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.CHRTYPE
    return info


def pax(**headers):
    info = tarfile.TarInfo(f"{NAME}/a")
    info.pax_headers = {key.replace("__", "."): value for key, value in headers.items()}
    return info


HOSTILE = {
    "path out": [(f"{NAME}/../../escaped", b"x")],
    "plain path out": [("../escaped", b"x")],
    "absolute path": [("/tmp/escaped-from-archive", b"x")],
    "other folder": [("Other/a", b"x")],
    "link out": [link(f"{NAME}/l", "/etc", tarfile.SYMTYPE), (f"{NAME}/l/escaped", b"x")],
    "hard link": [link(f"{NAME}/l", "../../escaped", tarfile.LNKTYPE)],
    "device": [device(f"{NAME}/null")],
    "file named like the folder": [(NAME, b"x")],
    "file used as a folder": [(f"{NAME}/a", b"x"), (f"{NAME}/a/b", b"x")],
    "name too long": [(f"{NAME}/{'a' * 300}", b"x")],
    "3,000 folders": [(f"{NAME}/{'a/' * 3000}x", b"x")],
    "1,500 folders, one by one": [(f"{NAME}/{'a/' * depth}x", b"x") for depth in range(1500)],
    "time without end": [pax(mtime="inf")],
    "time that is none": [pax(mtime="nan")],
    "name with a null": [pax(path=f"{NAME}/a\0b")],
    "holes that are none": [pax(GNU__sparse__map="a,b")],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_leave_nothing(kind, tmp_path):
    content = packed([(f"{NAME}/dataset.json", b"{}"), *HOSTILE[kind]])
    folder = tmp_path / "inner" / "data"
    with (
        Server(content) as server,
        pytest.raises(UserError, match=r"is no plain file|does not hold|cannot be unpacked"),
    ):
        fetch(server.archive, folder)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".tar"]
    assert left == []
    assert not (folder / NAME).exists()


@pytest.mark.parametrize(
    "content",
    [
        b"no tar at all" * 100,
        GOOD[:2000],
        packed([(f"{NAME}/a", bytes(2**24))], "w:gz"),
        packed([pax(hdrcharset="\u0422")]).replace("\u0422".encode(), b"\xd0x"),
    ],
    ids=["none", "truncated", "compressed", "no utf-8"],
)
def test_archives_that_cannot_be_unpacked(content, tmp_path):
    with Server(content) as server, pytest.raises(UserError, match="cannot be unpacked"):
        fetch(server.archive, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_an_archive_that_claims_more_than_the_disk(tmp_path):
    """A sparse member: few bytes in the archive, many on the disk."""
    info = tarfile.TarInfo(f"{NAME}/big")
    info.size = 2**50
    header = info.tobuf(format=tarfile.GNU_FORMAT)
    with Server(header + bytes(1024)) as server, pytest.raises(UserError, match="unpacks to more than"):
        fetch(server.archive, tmp_path)


def test_addresses_and_sums_are_monais():
    for name in Registry().names("task"):
        task = Registry().task(name)
        archive = task.archive()
        if name in ("brats", "btcv"):
            assert archive is None
            continue
        assert archive.url.startswith("https://")
        assert archive.url.endswith(f"{task.folder}.tar")
        assert len(archive.md5) == 32


@contextmanager
def answering(*, status=200, headers=(), body=b""):
    """A server that gives one answer to everything; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/x.tar"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x.tar", "http://[broken", "file:///etc/passwd", "http://:0/"])
def test_a_redirection_leads_to_the_web_only(target, tmp_path):
    with (
        answering(status=302, headers=[("Location", target)]) as url,
        pytest.raises(UserError, match=r"leads on to another address|is not allowed"),
    ):
        download(url, tmp_path / "x", "md5", "")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("length", ["abc", "-5", "1" * 30, ""])
def test_a_length_that_is_none_is_not_believed(length, tmp_path):
    with answering(headers=[("Content-Length", length)] if length else [], body=b"content") as url:
        assert download(url, tmp_path / "x", "md5", "") == hashlib.md5(b"content", usedforsecurity=False).hexdigest()


def test_a_server_without_an_end_does_not_fill_the_disk(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=100_000)
    monkeypatch.setattr("harness.data.download.shutil.disk_usage", lambda folder: usage)
    with answering(body=b"x" * 300_000) as url, pytest.raises(UserError, match="says no length"):
        download(url, tmp_path / "x", "md5", "")
