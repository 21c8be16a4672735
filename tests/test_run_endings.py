"""Memory that runs out: said by the process where it lives to, else by what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from biasdpo import run_endings, runs
from biasdpo.run_folder import RunFolder, Status
from biasdpo.run_state import START_MARK
from tests.run_line import ROOT, TIMEOUT_SECONDS, CommandLine
from training.status import cause_and_remedy

REMEDY = "with `python -m biasdpo train --run-id run --resume`"


@pytest.mark.parametrize(
    ("file", "content", "count"),
    [
        ("vmstat", "pgfault 7\noom_kill 3\n", 3),
        ("memory.events", "low 0\noom 5\noom_kill 2\noom_group_kill 9\n", 2),
        ("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\noom_kill 4\n", 4),
        ("without", "pgfault 7\n", None),
    ],
)
def test_kills_are_counted_in_each_of_the_kernels_files(tmp_path: Path, file: str, content: str, count: int | None) -> None:
    (tmp_path / file).write_text(content)
    assert run_endings._count(tmp_path / file) == count
    assert run_endings._count(tmp_path / "missing") is None


# A training process that may take so many bytes more, once all is imported. Its third step takes them all, down to the last
# kilobyte, and then wants more.
HUNGRY = """
import resource, sys
from pathlib import Path
import psutil
from biasdpo.run_folder import RunFolder
from training.__main__ import main
import training.dpo
from training.trainer import TokenizedDPOTrainer

step = TokenizedDPOTrainer.training_step
def hungry_step(self, *arguments, **more):
    hoard = []
    if self.state.global_step == 2:
        for size in (2**24, 2**20, 2**16, 2**12, 2**10):
            try:
                while True:
                    hoard.append(bytearray(size))
            except MemoryError:
                pass
        training.dpo.torch.empty(2**20)
    return step(self, *arguments, **more)
TokenizedDPOTrainer.training_step = hungry_step
limit = psutil.Process().memory_info().vms + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(RunFolder(Path(sys.argv[2]))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to a limit of address space")
def test_a_process_without_a_byte_left_says_so(command_line: CommandLine) -> None:
    folder = runs.make_folder(command_line.config(), "hungry", command_line.workspace)
    command = [sys.executable, "-c", HUNGRY, str(768 * 1024 * 1024), str(folder.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    status = folder.read_status()
    assert (status.state, status.step, done.returncode) == ("failed", 2, 1), done.stderr[-2000:]
    assert status.error.startswith("Out of memory: start a new run with a lower batch_size")
    assert folder.last_checkpoint() is not None


def dead(folder: RunFolder, log: str, **more: object) -> str:
    """The error of a run whose process is gone, whose log ends so."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.log.write_text(f"MemoryError of an earlier start\n{START_MARK}now\ncommand\n{log}\n")
    folder.write_status(Status("running", pid=2**22 + 1, pid_created=1.0, step=7, **more))  # type: ignore[arg-type]
    status = runs.poll(folder).status
    assert (status.state, "\n" in status.error) == ("interrupted", False)
    assert REMEDY in status.error
    return status.error


def test_a_run_that_ended_without_a_word_names_memory_where_something_speaks_for_it(tmp_path: Path) -> None:
    folder, counter = RunFolder(tmp_path / "run"), tmp_path / "memory.events"
    counter.write_text("oom_kill 2\n")
    before = {str(counter): 2}
    assert "ended without a word at step 7, as it does when it is killed or" in dead(folder, "step 7", memory_kills=before)
    aborted = dead(folder, "terminate called after throwing an instance of 'std::bad_alloc'\nFatal Python error: Aborted")
    assert (
        "memory was the likely cause (its log says \"terminate called after throwing an instance of 'std::bad_alloc'\")"
        in aborted
    )
    assert "free memory, then resume" in aborted
    counter.write_text("oom_kill 3\n")
    killed = dead(folder, "step 7", memory_kills=before)
    assert "memory was the likely cause (since it began, the kernel has killed a process for want of memory)" in killed
    counter.unlink()
    assert "memory was the likely cause" not in dead(folder, "step 7", memory_kills=before)


def test_the_counters_of_this_machine_can_be_read() -> None:
    counted = run_endings.memory_kills()
    assert all(count >= 0 for count in counted.values())
    assert run_endings.why_memory("", counted) == ""
    assert run_endings.why_memory("", dict.fromkeys(counted, -1)) or not counted


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
            "Out of memory: ",
        ),
        ("std::bad_alloc", "Out of memory: "),
        ("Cannot allocate memory (os error 12)", "Out of memory: "),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "Out of memory: "),
        ("can't start new thread", "Out of memory or of processes"),
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41", "Another of the run's"),
    ],
)
def test_what_libraries_say_of_memory_and_of_a_lost_process(text: str, line: str) -> None:
    said = cause_and_remedy(RuntimeError(text))
    assert said.startswith(line)
    assert "resume" in said
