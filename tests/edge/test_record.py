"""Lines are never lost quietly: locks, rotation, closed streams, full disks, and what counts as done."""

import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from PIL import Image

from anomalib_ot.edge.command import run
from anomalib_ot.edge.frames import Frame, InspectError, changed_at
from anomalib_ot.edge.record import OutputFile, Record
from anomalib_ot.edge.results import Result

from .conftest import ENV, INSPECT, frame, lines, start, wait_until

posix = pytest.mark.skipif(os.name == "nt", reason="locks, pipes and descriptors of POSIX")


def result(name):
    return Result(str(name), "good", 0.25, (40, 32))


def names(path):
    return [found["name"] for found in lines(path)]


@posix
def test_a_file_has_one_writer(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"name": "a"}\n{"na')  # as a living writer may have it at this moment
    with Record(path, resume=True) as first:
        first.write(result("b"))
        with path.open("a") as file:
            file.write('{"na')
        with pytest.raises(InspectError, match="which another inspection writes; end that one"):
            Record(path, resume=True)
    assert path.read_text().endswith('\n{"na')  # the second has cut nothing off
    with Record(path, resume=True) as again:
        assert (again.count, again.cut) == (2, True)


@posix
def test_a_second_inspection_on_one_file_is_refused(bright, line, tmp_path, capsys):
    output = tmp_path / "lines.jsonl"
    process = start(bright, "-", "--output", output)
    process.stdin.write(f"{line}/part_00.png\n")
    process.stdin.flush()
    wait_until(lambda: output.exists() and output.read_bytes())
    status = run([str(bright), str(line), "--output", str(output)])
    process.communicate(timeout=60)
    assert (status, process.returncode) == (2, 0)
    assert "which another inspection writes" in capsys.readouterr().err
    assert len(lines(output)) == 1


@posix
@pytest.mark.parametrize("kind", ["moved", "deleted", "cut off", "replaced"])
def test_a_rotation_loses_no_line(kind, tmp_path):
    path, said = tmp_path / "lines.jsonl", []
    with Record(path, say=said.append) as record:
        for number in range(9):
            if number in (3, 6):
                if kind == "cut off":
                    os.truncate(path, 0)  # logrotate's copytruncate
                else:
                    path.unlink() if kind == "deleted" else path.rename(tmp_path / f"lines.{number}")
                if kind == "replaced":
                    path.touch()
            record.write(result(number))
    assert names(path) == ["6", "7", "8"]
    if kind in ("moved", "replaced"):
        assert names(tmp_path / "lines.6") == ["3", "4", "5"]
        assert names(tmp_path / "lines.3") == ["0", "1", "2"]
    assert len(said) == (0 if kind == "cut off" else 2)


@posix
def test_a_line_written_into_a_file_that_was_deleted_at_that_moment_is_written_again(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    write = os.write
    with Record(path) as record:
        record.write(result("a"))

        def deleted_meanwhile(descriptor, data):
            monkeypatch.setattr(os, "write", write)
            path.unlink()
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", deleted_meanwhile)
        record.write(result("b"))
    assert names(path) == ["b"]


@posix
def test_what_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    write, calls = os.write, []

    def full(descriptor, data):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:10])

    with Record(path) as record:
        record.write(result("a"))
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(InspectError, match=r"No space left on device.*make room, then go on with --resume"):
            record.write(result("b"))
        monkeypatch.setattr(os, "write", write)
    assert names(path) == ["a"]


@posix
def test_lines_are_on_the_disk_in_time(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def counted(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    with Record(tmp_path / "each.jsonl", sync=0) as record:
        for number in range(3):
            record.write(result(number))
            assert synced[-1] == (tmp_path / "each.jsonl").stat().st_size
    synced.clear()
    with Record(tmp_path / "soon.jsonl", sync=0.05) as record:
        record.write(result(0))
        wait_until(lambda: synced and synced[-1] == (tmp_path / "soon.jsonl").stat().st_size)  # with no further line
    synced.clear()
    with Record(tmp_path / "late.jsonl", sync=3600) as record:
        for number in range(5):
            record.write(result(number))
        assert synced == []
    assert synced == [(tmp_path / "late.jsonl").stat().st_size]


@posix
def test_a_disk_that_does_not_keep_lines_is_an_error(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(InspectError, match="Input/output error"), Record(tmp_path / "x.jsonl", sync=3600) as record:
        record.write(result("a"))
    failing = OutputFile(tmp_path / "y.jsonl", sync=0.001)
    failing.write(b"{}\n")
    wait_until(lambda: failing._failure is not None)
    with pytest.raises(OSError, match="Input/output error"):
        failing.write(b"{}\n")
    with pytest.raises(OSError, match="Input/output error"):
        failing.close()


# ---- streams


@posix
@pytest.mark.parametrize("words", [("--help",), ()], ids=["--help", "frames"])
@pytest.mark.slow
def test_closed_streams(words, bright, line):
    command = subprocess.list2cmdline([*INSPECT, str(bright), str(line), *words])
    quiet = subprocess.run(f"{command} 2>&-", shell=True, env=ENV, stdout=subprocess.PIPE, text=True, timeout=120)
    assert quiet.returncode == 0
    if words:
        return
    assert len(lines(quiet.stdout)) == 12  # and no message among them
    mute = subprocess.run(f"{command} >&-", shell=True, env=ENV, stderr=subprocess.PIPE, text=True, timeout=120)
    assert mute.returncode == 2
    assert "standard output is closed, so that results would be lost" in mute.stderr
    deaf = subprocess.run(
        f"{subprocess.list2cmdline([*INSPECT, str(bright), '-'])} <&-",
        shell=True,
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert deaf.returncode == 2
    assert "standard input is closed" in deaf.stderr


@posix
def test_with_closed_streams_a_file_holds_lines_only(bright, line, tmp_path):
    words = [*INSPECT, str(bright), str(line), "--output", str(tmp_path / "lines.jsonl")]
    done = subprocess.run(f"{subprocess.list2cmdline(words)} <&- >&- 2>&-", shell=True, env=ENV, timeout=120)
    assert done.returncode == 0
    assert len(lines(tmp_path / "lines.jsonl")) == 12


@posix
def test_a_full_standard_output_ends_with_one_line(bright, line):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        words = [*INSPECT, str(bright), str(line)]
        done = subprocess.run(words, env=ENV, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert "standard output cannot be written" in done.stderr.splitlines()[-1]


@posix
def test_a_pipe_nobody_reads_is_refused_and_one_that_is_read_is_fed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InspectError, match="a pipe that nobody reads"):
        Record(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    found = []

    def opened():
        try:
            found.append(Record(tmp_path / "pipe"))
        except InspectError:
            return False
        return True

    wait_until(opened)
    with found[0] as record:
        record.write(result("a"))
    reader.join(30)
    assert names_of(read[0]) == ["a"]


def names_of(text):
    return [found["name"] for found in lines(text)]


# ---- what is done


def test_one_file_has_one_key_whatever_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    with Record("lines.jsonl") as record:
        record.write(result("in/a.png"))
    others = ["in/a.png", "./in/a.png", "in/../in/a.png", str(tmp_path / "in" / "a.png")]
    if os.name != "nt":
        (tmp_path / "link").symlink_to(tmp_path / "in")
        others.append("link/a.png")
    with Record("lines.jsonl", resume=True) as record:
        assert all(record.has(Frame(name, name)) for name in others)
        assert not record.has(Frame("a.png", "a.png"))
        assert not record.has(Frame("in/b.png", "in/b.png"))


def test_a_watched_file_that_was_read_before_its_change_was_seen_has_its_line(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    watched, named = (Frame(str(path), path, retry=retry) for retry in (lambda: False, None))
    with Record(tmp_path / "lines.jsonl") as record:
        assert not record.has(watched)
        record.write(replace(result(str(path)), changed=changed_at(path)))
        assert record.has(watched)
        assert not record.has(named)  # who names a file twice gets two lines
        os.utime(path, (1, 1))
        assert not record.has(watched)


def test_a_file_that_was_mended_or_replaced_is_inspected_when_resumed(bright, tmp_path, capsys):
    folder, output = tmp_path / "in", tmp_path / "lines.jsonl"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(frame(0)).save(folder / name)
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[:60])
    os.utime(folder / "a.png", (1, 1))
    words = [str(bright), str(folder), "--output", str(output), "--resume"]
    assert run(words) == 1
    assert run(words) == 0  # nothing is inspected twice
    (folder / "a.png").write_bytes(whole)
    assert run(words) == 0
    assert run(words) == 0
    assert [found["verdict"] for found in lines(output)] == ["error", "good", "good"]
    assert lines(output)[0]["changed"] == "1970-01-01T00:00:01.000000Z"
    capsys.readouterr()


def test_lines_of_before_are_gone_on_with(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "lines.jsonl").write_text(
        f'{{"name": "{(tmp_path / "a.png").as_posix()}", "verdict": "good"}}\n[1]\n3\n'
    )
    with Record(tmp_path / "lines.jsonl", resume=True) as record:
        assert record.has(Frame(str(tmp_path / "a.png"), tmp_path / "a.png"))
        assert (record.count, record.damaged) == (1, 2)


def test_a_stream_that_is_no_file_is_written(monkeypatch, capsys):
    with Record() as record:
        record.write(result("a"))
    assert names_of(capsys.readouterr().out) == ["a"]
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InspectError, match="standard output is closed"):
        Record()
