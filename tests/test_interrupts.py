"""Ctrl-C at any time of any command: exit code 130 within seconds, no traceback; a second one exits at once."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from train_fixtures import config_of, write_config

from vllama_jax.runtime.interrupts import GRACE_SECONDS, exit_on_interrupt

SLOW = pytest.mark.slow
BEGIN = (
    "import sys\nfrom vllama_jax.runtime.interrupts import *\n"
    "import vllama_jax.runtime.interrupts\nvllama_jax.runtime.interrupts.GRACE_SECONDS = float(sys.argv[1])\n"
    "with exit_on_interrupt(until_exit=True):\n    print('begun', flush=True)\n"
)


@contextmanager
def started(body: str, *arguments: str, grace: float = 0.5) -> Iterator[subprocess.Popen]:
    """Start a process that runs `body` as a command runs; `body` reads its arguments from sys.argv[2:]."""
    code = BEGIN + "".join(f"    {line}\n" for line in body.splitlines())
    command = [sys.executable, "-c", code, str(grace), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


def interrupted(process: subprocess.Popen, within: float) -> str:
    """Interrupt a process with one Ctrl-C; return its output, which must contain nothing from Python."""
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=within + 30)
    # At the end of its exit, Python gives signals their default action back; a shell reports 130 for that too.
    assert process.returncode in (130, -signal.SIGINT)
    assert time.monotonic() - begun < within
    assert "Traceback" not in errors
    assert "KeyboardInterrupt" not in errors
    return out + errors


@pytest.mark.parametrize(
    "body",
    [
        "import time; time.sleep(100)",
        # KeyboardInterrupt is lost: in a destructor, in a handler of all exceptions, or as the cause of another error.
        "import time\nclass Held:\n    def __del__(self): time.sleep(100)\nheld = Held()\ndel held\ntime.sleep(100)",
        "import time\ntry: time.sleep(100)\nexcept BaseException: pass\ntime.sleep(100)",
        "import time\ntry: time.sleep(100)\nexcept BaseException as error: raise ImportError('x') from error",
        "import time\ntry: time.sleep(100)\nexcept BaseException as error: sys.exit('vllama: odd')",
        # KeyboardInterrupt is late: the main thread waits for a thread or runs native code.
        "import time\nfrom concurrent.futures import *\nwith ThreadPoolExecutor() as it: it.submit(time.sleep, 100)",
        "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
        "import time\nimport threading\nthreading.Thread(target=time.sleep, args=(100,)).start()\ntime.sleep(100)",
        # The body has ended: Python waits for a thread, or runs a function at exit.
        "import time\nimport threading\nthreading.Thread(target=time.sleep, args=(100,)).start()",
        "import time\nimport atexit\natexit.register(time.sleep, 100)",
    ],
    ids=["plain", "destructor", "swallowed", "another error", "exit", "pool", "native", "thread", "joining", "atexit"],
)
def test_an_interrupt_ends_the_process_whatever_it_does(body):
    with started(body) as process:
        time.sleep(0.3)
        assert interrupted(process, within=10) == ""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["jax.jit(run)()", "import interrupted_module"], ids=["jax", "import"])
def test_native_code_returns_before_the_exception_is_raised(call, tmp_path):
    """Native code that calls Python may crash if the call raises: nanobind while it is imported, MLIR in a callback."""
    inside = "print('inside', flush=True); time.sleep(1); print('returned', flush=True)"
    (tmp_path / "interrupted_module.py").write_text(f"import time\n{inside}\n")
    body = (
        f"import jax\nimport time\nsys.path.append({str(tmp_path)!r})\ndef run(): {inside}\n"
        f"try:\n    {call}\n    print('after', flush=True)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\ntime.sleep(100)"
    )
    with started(body, grace=2) as process:
        assert process.stdout.readline() == "inside\n"
        assert interrupted(process, within=10) == "returned\ninterrupted\n"


def test_partial_files_are_removed_first(tmp_path):
    body = (
        "import time\nfrom pathlib import Path\nfrom vllama_jax.io.atomic import new_directory\n"
        "with new_directory(Path(sys.argv[2])) as folder:\n"
        "    (folder / 'file').write_text('half'); print('inside', flush=True); time.sleep(100)"
    )
    with started(body, str(tmp_path / "model")) as process:
        assert process.stdout.readline() == "inside\n"
        interrupted(process, within=10)
    assert list(tmp_path.iterdir()) == []


SAVING = (
    "import time\nwith defer_interrupt() as asked:\n"
    "    print('deferring', flush=True); asked.wait(); print('saving', flush=True)\n"
    "    time.sleep(float(sys.argv[2])); print('saved', flush=True); raise SavedInterrupt"
)


def test_an_interrupt_waits_for_saving():
    with started(SAVING, "1.5") as process:
        assert process.stdout.readline() == "deferring\n"
        assert interrupted(process, within=20) == "saving\nsaved\n"


def test_a_second_interrupt_ends_the_process_at_once():
    with started(SAVING, "1000") as process:
        assert process.stdout.readline() == "deferring\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "saving\n"
        assert interrupted(process, within=5) == ""


def test_an_error_while_saving_is_still_reported():
    body = (
        "with defer_interrupt() as asked:\n"
        "    print('deferring', flush=True); asked.wait(); sys.exit('vllama: the disk is full')"
    )
    with started(body) as process:
        assert process.stdout.readline() == "deferring\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "vllama: the disk is full\n")
        assert process.returncode == 1


CATCHING = (
    "import time\nwith catch_interrupts(lambda: print('noticed', flush=True)) as interrupted:\n"
    "    print('catching', flush=True)\n    {}"
)


def test_a_caught_interrupt_does_not_end_the_process():
    body = CATCHING.format("for _ in range(3): interrupted.wait(); print('stopped', flush=True); interrupted.clear()")
    with started(f"{body}\nprint('after', flush=True); time.sleep(100)", grace=0.1) as process:
        assert process.stdout.readline() == "catching\n"
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            assert [process.stdout.readline() for _ in range(2)] == ["noticed\n", "stopped\n"]
            time.sleep(0.2)  # longer than the grace period
        assert process.stdout.readline() == "after\n"
        assert interrupted(process, within=10) == ""


@pytest.mark.parametrize(
    "body", ["time.sleep(100)", "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"]
)
def test_a_second_interrupt_or_sigterm_ends_the_process_that_catches(body):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with started(CATCHING.format(body)) as process:
            assert process.stdout.readline() == "catching\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "noticed\n"
            process.send_signal(number)
            assert process.communicate(timeout=30) == ("", "")
            assert process.returncode == code


def test_signals_are_caught_after_an_event_loop_has_run():
    body = (
        "import asyncio, time\nasync def prompt():\n    loop = asyncio.get_running_loop()\n"
        "    loop.add_signal_handler(signal.SIGTERM, print)\n"
        "with catch_interrupts(lambda: print('noticed', flush=True)) as interrupted:\n"
        "    with release_signals(): asyncio.run(prompt())\n"
        "    print('ready', flush=True); interrupted.wait(); time.sleep(100)"
    )
    with started(body) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "noticed\n"
        process.terminate()
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 143


def test_an_interrupt_ends_a_background_job_of_a_script():
    """The shell makes background jobs ignore SIGINT, so whoever sends it does so on purpose."""
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + BEGIN + "    import time; time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, "0.1"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130


def test_signal_handlers_are_restored():
    def handlers() -> tuple:
        return signal.getsignal(signal.SIGINT), sys.unraisablehook, sys.excepthook, threading.excepthook

    before = handlers()
    with exit_on_interrupt():
        assert not any(one is other for one, other in zip(handlers(), before, strict=True))
    assert handlers() == before


def test_errors_of_threads_are_reported_until_ctrl_c():
    """Then they fail because the main thread has ended its work."""
    body = (
        "import time\nimport threading\nimport os\n"
        "def fail(seconds, text): time.sleep(seconds); raise RuntimeError(text)\n"
        "threading.Thread(target=fail, args=(0, 'first')).start()\ntime.sleep(0.3)\nprint('ready', flush=True)\n"
        "try: time.sleep(100)\n"
        "except KeyboardInterrupt:\n    threading.Thread(target=fail, args=(0, 'second')).start()\n"
        "    time.sleep(0.3); sys.excepthook(RuntimeError, RuntimeError('third'), None)"
    )
    with started(body, grace=5) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 130
    assert "first" in errors
    assert "second" not in errors
    assert "third" not in errors


@SLOW
@pytest.mark.parametrize("command", ["train", "chat", "features", "convert"])
def test_an_interrupt_ends_a_command_at_any_time_of_its_start(command, tiny_model, tiny_files, records, clip, tmp_path):
    """At times from the first import to the command's work; all commands but training may be done before.

    Their process then sleeps: Python drops a signal that arrives while it destroys its modules, and exits with 0.
    """
    config = str(write_config(tmp_path / "config.py", config_of(tiny_model, records, steps=100_000)))
    out = tmp_path / "out"
    arguments = {
        "train": [config, "--out", out],
        "features": [config, "--out", out],
        "chat": [clip, "What is there?", "--model", tiny_model, "--max-new-tokens", "800"],
        "convert": [
            *("--llama", tiny_files["llama"], "--eva-vit", tiny_files["eva_vit"], "--blip2", tiny_files["blip2"]),
            *("--config", tiny_files["config"], "--out", out),
        ],
    }[command]
    body = "import time\nfrom vllama_jax.cli import main\nmain(sys.argv[2:])"
    if command != "train":
        body += "\ntime.sleep(100)"
    for seconds in (0, 0.5, 1, 2, 4, 7, 11):
        with started(body, command, *map(str, arguments), grace=GRACE_SECONDS) as process:
            time.sleep(seconds)
            if command == "convert" and process.poll() == 1:  # the previous process has written the output directory
                assert seconds >= 1  # a conversion takes less than two seconds on a fast machine
                break
            interrupted(process, within=GRACE_SECONDS + 7)
