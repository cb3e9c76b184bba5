# SPDX-License-Identifier: Apache-2.0
"""The capture directory: private, whole, bounded; and the three destinations."""

from __future__ import annotations

import gzip
import os
import re
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from otel_proflink.config import Config
from otel_proflink.exporters import Batch, ExportError, create_exporter
from otel_proflink.exporters import file as file_module
from otel_proflink.exporters.file import CaptureDirectory


def directory_at(path: Path, **arguments: Any) -> CaptureDirectory:
    return CaptureDirectory(
        str(path), **{"start_unix_s": 1000, "max_bytes": 0, "max_age_s": 0, **arguments}
    )


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_directory_and_files_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        path = tmp_path / "deep" / "out"
        name = directory_at(path).write("spans", 3, b"{}\n")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / name).stat().st_mode) == 0o600
    assert (path / name).read_bytes() == b"{}\n"


def test_files_are_private_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    write = os.write

    def spying_write(descriptor: int, data: Any) -> int:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return write(descriptor, data[:2])  # and a short write each time

    monkeypatch.setattr(file_module.os, "write", spying_write)
    old = os.umask(0)
    try:
        name = directory_at(tmp_path).write("profile", 0, b"abcde")
    finally:
        os.umask(old)
    assert modes == [0o600] * 3
    assert (tmp_path / name).read_bytes() == b"abcde"


def test_names(tmp_path: Path) -> None:
    directory = directory_at(tmp_path)
    pattern = rf"profile-([\w.-]+)-{os.getpid()}-1000-7\.pb\.gz"
    assert re.fullmatch(pattern, directory.write("profile", 7, b""))
    assert re.fullmatch(
        pattern.replace("profile", "spans").replace(r"pb\.gz", "json"),
        directory.name("spans", 7),
    )


@pytest.mark.parametrize(
    ("host", "safe"),
    [
        ("web-1.example.com", "web-1.example.com"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("bücher host", "b_cher_host"),
        ("", "host"),
        ("...", "host"),
        ("x" * 300, "x" * 64),
    ],
)
def test_host_names_are_made_safe(host: str, safe: str) -> None:
    assert file_module._safe_host(host) == safe


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = directory_at(tmp_path)
    directory.write("profile", 0, b"old")

    def full(_descriptor: int, _data: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(file_module.os, "write", full)
        with pytest.raises(ExportError, match="No space left on device"):
            directory.write("profile", 1, b"new")
        with pytest.raises(ExportError, match="No space left"):
            directory.replace("profile", 0, b"new")
    assert names(tmp_path) == [directory.name("profile", 0)]
    assert (tmp_path / names(tmp_path)[0]).read_bytes() == b"old"


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = tmp_path / "out"
    path.mkdir()
    directory = directory_at(path)
    directory.prepare()
    (path / f".{directory.name('profile', 0)}.tmp").symlink_to(victim)
    (path / directory.name("profile", 0)).symlink_to(victim)
    directory.write("profile", 0, b"data")
    assert victim.read_bytes() == b"precious"
    assert not (path / directory.name("profile", 0)).is_symlink()


def test_the_directory_may_be_removed_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "out"
    directory = directory_at(path)
    (path / directory.write("profile", 0, b"x")).unlink()
    path.rmdir()
    assert (path / directory.write("profile", 1, b"y")).read_bytes() == b"y"


def test_the_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    directory = directory_at(Path("out"))
    monkeypatch.chdir(tmp_path / "b")
    directory.write("profile", 0, b"")
    assert (tmp_path / "a" / "out").is_dir()
    assert names(tmp_path / "b") == []


def test_two_runs_in_the_same_second_do_not_overwrite_each_other(tmp_path: Path) -> None:
    first = directory_at(tmp_path).write("profile", 0, b"1")
    second = directory_at(tmp_path).write("profile", 0, b"2")
    assert first != second
    assert "-1001-0" in second
    assert (tmp_path / first).read_bytes() == b"1"


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_an_unusable_directory_is_explained(tmp_path: Path, kind: str) -> None:
    blocker = tmp_path / "blocker"
    blocker.write_bytes(b"")
    directory = directory_at(blocker if kind == "file" else blocker / "out")
    for step in (directory.prepare, lambda: directory.write("profile", 0, b"")):
        with pytest.raises(ExportError, match=r"cannot write to .*blocker.*directory"):
            step()


def test_prepare_leaves_nothing_behind(tmp_path: Path) -> None:
    directory_at(tmp_path / "out").prepare()
    assert names(tmp_path / "out") == []


def test_replace_only_what_is_there(tmp_path: Path) -> None:
    directory = directory_at(tmp_path)
    name = directory.write("profile", 0, b"old")
    assert directory.replace("profile", 0, b"new")
    assert (tmp_path / name).read_bytes() == b"new"
    (tmp_path / name).unlink()
    assert not directory.replace("profile", 0, b"newer")
    assert names(tmp_path) == []


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_size_cap_drops_the_oldest(tmp_path: Path) -> None:
    directory = directory_at(tmp_path, max_bytes=250)
    written = []
    for sequence in range(5):
        written.append(directory.write("profile", sequence, b"x" * 100))
        aged(tmp_path / written[-1], 100 - sequence)
    directory.prune(keep=written[-1:])
    assert names(tmp_path) == written[-2:]
    assert directory.files_dropped == 3


def test_size_cap_never_drops_the_current(tmp_path: Path) -> None:
    directory = directory_at(tmp_path, max_bytes=10, max_age_s=1)
    old = directory.write("profile", 0, b"x" * 100)
    current = directory.write("profile", 1, b"x" * 100)
    aged(tmp_path / current, 1000)  # older by its clock than the other one
    directory.prune(keep=[current])
    assert names(tmp_path) == [current]
    assert old not in names(tmp_path)


def test_age_cap(tmp_path: Path) -> None:
    directory = directory_at(tmp_path, max_age_s=60)
    old, young = (directory.write("spans", sequence, b"") for sequence in (0, 1))
    aged(tmp_path / old, 61)
    directory.prune(keep=[])
    assert names(tmp_path) == [young]
    assert directory.files_dropped == 1


def test_only_our_own_files_are_touched(tmp_path: Path) -> None:
    foreign = ["notes.txt", "profile-x.pb.gz", "profile-h-1-2-3.pb", "spans-h-1-2-3.json.bak"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"x" * 1000)
        aged(tmp_path / name, 10_000)
    (tmp_path / "profile-h-1-2-3.pb.gz").mkdir()
    (tmp_path / "spans-h-1-2-4.json").symlink_to(tmp_path / "notes.txt")
    ours = tmp_path / "profile-other-host-99-5-6.pb.gz"  # of another process: counted, dropped
    ours.write_bytes(b"x" * 1000)
    aged(ours, 10_000)
    directory = directory_at(tmp_path, max_bytes=1, max_age_s=1)
    directory.prune(keep=[])
    assert directory.files_dropped == 1
    assert set(names(tmp_path)) == {*foreign, "profile-h-1-2-3.pb.gz", "spans-h-1-2-4.json"}


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    stale, fresh = (tmp_path / f".profile-h-1-2-{n}.pb.gz.tmp" for n in (3, 4))
    for path in (stale, fresh):
        path.write_bytes(b"half")
    aged(stale, 7200)
    directory_at(tmp_path, max_age_s=1_000_000).prune(keep=[])
    assert names(tmp_path) == [fresh.name]


def test_processes_prune_side_by_side(tmp_path: Path) -> None:
    directories = [directory_at(tmp_path, max_bytes=1) for _ in range(4)]
    for sequence in range(200):
        directories[0].write("profile", sequence, b"x")
    threads = [threading.Thread(target=d.prune, args=([],)) for d in directories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names(tmp_path)) <= 1
    assert sum(d.files_dropped for d in directories) == 200 - len(names(tmp_path))


def test_file_writes_profiles_and_spans(tmp_path: Path) -> None:
    exporter = create_exporter(Config(output_dir=str(tmp_path)), start_unix_s=5)
    assert exporter.wants_profiles
    assert exporter.wants_spans
    exporter.prepare()
    exporter.export(Batch(sequence=0, profile=b"profile", spans=b"{}\n"))
    profile, spans = sorted(tmp_path.iterdir())
    assert gzip.decompress(profile.read_bytes()) == b"profile"
    assert spans.read_bytes() == b"{}\n"
    assert profile.name.endswith("-5-0.pb.gz")
    assert spans.name.endswith("-5-0.json")


def test_pprof_writes_profiles_only(tmp_path: Path) -> None:
    exporter = create_exporter(Config(output_dir=str(tmp_path), exporter="pprof"), start_unix_s=5)
    assert not exporter.wants_spans
    exporter.export(Batch(sequence=0, profile=b"profile", spans=b"{}\n"))
    (profile,) = tmp_path.iterdir()
    assert profile.name.startswith("profile-")


def test_none_writes_nothing(tmp_path: Path) -> None:
    exporter = create_exporter(
        Config(output_dir=str(tmp_path / "out"), exporter="none"), start_unix_s=5
    )
    exporter.prepare()
    exporter.export(Batch(sequence=0, profile=b"profile", spans=b"{}\n"))
    assert not exporter.replace_profile(Batch(sequence=0, profile=b"profile"))
    exporter.shutdown()
    assert names(tmp_path) == []


def test_the_same_batch_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    exporter = create_exporter(Config(output_dir=str(tmp_path)), start_unix_s=5)
    exporter.export(Batch(sequence=0, profile=b"one", spans=b"{}\n"))
    exporter.export(Batch(sequence=0, profile=b"two", spans=b"{}\n"))
    assert len(names(tmp_path)) == 2
    assert exporter.replace_profile(Batch(sequence=0, profile=b"three"))
    (profile,) = tmp_path.glob("profile-*")
    assert gzip.decompress(profile.read_bytes()) == b"three"
