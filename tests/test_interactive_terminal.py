"""The interactive chat in a pseudo-terminal: keys, history, pasted text, signals, and a whole session."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pexpect
import pytest
from pexpect import fdpexpect
from PIL import Image

PROMPT = r"\x1b\[\?2004h"  # switches bracketed paste on: the prompt reads keys
CTRL_C, CTRL_D, UP, ENTER = "\x03", "\x04", "\x1b[A", "\r"
PROMPT_ONLY = (
    "from vllama_jax.cli._prompt import read_lines\nfrom vllama_jax.runtime.interrupts import *\nimport sys\n"
    "with exit_on_interrupt(), catch_interrupts(lambda: None):\n"
    "    for line in read_lines(['/add', '/set'], ['/add'], print): print('read', repr(line))\n"
    "print('left')"
)


def paste(text: str) -> str:
    """Return what a terminal sends for a text that is pasted."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal(fdpexpect.fdspawn):
    """A pseudo-terminal in which Python code runs. It is in a process that is not forked, as JAX has threads here.

    Args:
        code: The code.
        arguments: Its arguments.
        cache: The cache folder.
        terminal_type: The value of TERM.
    """

    def __init__(self, code: str, *arguments: object, cache: Path, terminal_type: str = "xterm"):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment |= {"VLLAMA_CACHE": str(cache), "TERM": terminal_type}
        code = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY)\n{code}"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 200))
        files = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process = subprocess.Popen(command, **files, env=environment, start_new_session=True)
        os.close(slave)
        super().__init__(master, encoding="utf-8", timeout=60)
        self.expect_prompt()

    def expect_prompt(self) -> None:
        """Wait until the prompt reads keys."""
        self.expect(PROMPT)
        while termios.tcgetattr(self.child_fd)[3] & termios.ECHO:
            time.sleep(0.01)


@pytest.fixture
def start():
    """A function that starts a `Terminal` and waits for its prompt. Its process ends with the test."""
    terminals = []

    def start_terminal(*arguments, **options):
        terminals.append(Terminal(*arguments, **options))
        return terminals[-1]

    yield start_terminal
    for terminal in terminals:
        terminal.process.kill()
        terminal.process.wait()
        terminal.close()


def enter(terminal: Terminal, *keys: str, expected: str = "") -> str:
    """Send keys, expect a text, and return what was printed before it, up to the next prompt."""
    for key in keys:
        terminal.send(key)
    terminal.expect(expected)
    printed = terminal.before + terminal.after
    terminal.expect_prompt()
    return printed + terminal.before


def leave(terminal: Terminal, *keys: str) -> str:
    """Send keys that end the program, and return the rest of the output."""
    for key in keys:
        terminal.send(key)
    terminal.expect(pexpect.EOF)
    terminal.process.wait(timeout=60)
    return terminal.before


def test_the_prompt_edits_lines_and_remembers_them(start, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").touch()
    first = start(PROMPT_ONLY, cache=tmp_path)
    enter(first, "What>", "\x1b[D", "is it", "\x7f\x7f", "?", ENTER, expected=r"read 'Whatis \?>'")
    enter(first, paste("two\r\nlines"), ENTER, expected=r"read 'two\\nlines'")
    enter(first, "dropped", CTRL_C)
    enter(first, CTRL_C, expected="Ctrl-D or /exit ends the chat")
    first.send("/a\t")
    first.expect("dd")
    first.send(f" {tmp_path}/clips/\t")
    first.expect(r"a\.mp4")
    enter(first, ENTER, expected=f"read '/add {tmp_path}/clips/a.mp4'")
    enter(first, ENTER, expected="read ''")
    leave(first, CTRL_D)
    assert first.process.returncode == 0
    assert (tmp_path / "chat_history").stat().st_mode & 0o777 == 0o600
    second = start(PROMPT_ONLY, cache=tmp_path)
    enter(second, UP, UP, UP, ENTER, expected=r"read 'two\\nlines'")
    leave(second, CTRL_D)


def test_sigterm_at_the_prompt_restores_the_terminal(start, tmp_path):
    code = f"import atexit; atexit.register(lambda: open({str(tmp_path / 'out')!r}, 'w').write(str(echoes())))\n"
    code += "def echoes(): return bool(termios.tcgetattr(0)[3] & termios.ECHO)\n"
    terminal = start(code + PROMPT_ONLY, cache=tmp_path)
    terminal.process.terminate()
    leave(terminal)
    assert terminal.process.returncode == 143
    assert (tmp_path / "out").read_text() == "True"


@pytest.mark.parametrize(("action", "code"), [("SIG_DFL", -signal.SIGHUP), ("SIG_IGN", 1)])
def test_a_closed_terminal_ends_the_program(start, tmp_path, action, code):
    terminal = start(f"import signal; signal.signal(signal.SIGHUP, signal.{action})\n{PROMPT_ONLY}", cache=tmp_path)
    terminal.close()
    assert terminal.process.wait(timeout=60) == code


def test_the_prompt_is_on_stderr_if_stdout_is_a_file(start, tmp_path):
    code = f"import sys; sys.stdout = open({str(tmp_path / 'out')!r}, 'w')\n" + PROMPT_ONLY
    terminal = start(code, cache=tmp_path)
    leave(terminal, "What?", ENTER, CTRL_D)
    assert (tmp_path / "out").read_text() == "read 'What?'\nleft\n"


def test_a_dumb_terminal_gets_no_control_sequences(start, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PROMPT", "> ")
    terminal = start(PROMPT_ONLY, cache=tmp_path, terminal_type="dumb")
    printed = enter(terminal, "What?", ENTER, expected=r"read 'What\?'")
    printed += enter(terminal, "Who", CTRL_C) + enter(terminal, CTRL_C, expected="Ctrl-D or /exit")
    printed += leave(terminal, CTRL_D)
    assert terminal.process.returncode == 0
    assert "\x1b" not in printed


@pytest.mark.parametrize("target", ["folder", "missing/file"])
def test_a_history_that_cannot_be_kept_is_reported(start, tmp_path, target):
    (tmp_path / "folder").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/chat_history").symlink_to(tmp_path / target)
    terminal = start(PROMPT_ONLY, cache=tmp_path / "cache")
    assert "vllama: the history is not kept (" in terminal.before
    enter(terminal, "What?", ENTER, expected=r"read 'What\?'")
    enter(terminal, UP, ENTER, expected=r"read 'What\?'")
    leave(terminal, CTRL_D)


CHAT = """
import sys, time
from vllama_jax.chat import Chat

ask = Chat.ask

def ask_slowly(chat, question, **options):
    yield "⟦"
    for text in ask(chat, question, **options):
        yield text
        time.sleep(0.5 if "slowly" in question else 0)
    yield "⟧"

Chat.ask = ask_slowly
from vllama_jax.cli import main
main()
"""


@pytest.mark.slow
def test_a_chat_in_a_terminal(start, tiny_model, tmp_path):
    picture = tmp_path / "my picture.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    chat = start(CHAT, "chat", "--model", tiny_model, "--max-new-tokens", 100, cache=tmp_path / "cache")
    banner = (
        r"model: \d\.\d million parameters, .*B, float32, on cpu; prompt template vicuna, context of 1,024 tokens\r\n"
    )
    assert re.search(banner, chat.before)
    enter(chat, "/help", ENTER, expected="/save FILE")
    enter(chat, "/files", ENTER, expected="the conversation has no files")
    enter(chat, "/add nothing.png", ENTER, expected="vllama: nothing.png: no such file")
    enter(chat, f"/add {picture}", ENTER, expected="my picture.png: 1 image")
    enter(chat, "/files", ENTER, expected="my picture.png: 1 image")
    answer = enter(chat, "What is it?", ENTER, expected="⟦(?s:.+)⟧").partition("⟦")[2]

    chat.send(f"Tell it slowly{ENTER}")
    chat.expect("⟦(?s:.)")
    assert "⟧" not in enter(chat, CTRL_C, expected="stopped; the conversation is as before this question")
    enter(chat, "/undo", ENTER, expected=r"removed, with its answer: What is it\?")
    assert enter(chat, "What is it?", ENTER, expected="⟦(?s:.+)⟧").partition("⟦")[2] == answer

    enter(chat, "/set max_new_tokens 5", ENTER, expected="max_new_tokens 5")
    printed = enter(chat, paste("Two\nlines?"), ENTER, expected="⟦(?s:.+)⟧")
    assert printed.count("⟦") == 1
    enter(chat, "/set max_new_tokens 5000", ENTER, expected="max_new_tokens 5000")
    enter(
        chat, "Why?", ENTER, expected="vllama: the prompt has .* tokens .*; in this chat: /undo .*/set max_new_tokens N"
    )
    enter(chat, "/set max_new_tokens 5", ENTER, expected="max_new_tokens 5")
    enter(chat, "Why?", CTRL_C)
    enter(chat, f"/save {tmp_path}/chat.json", ENTER, expected="saved to ")
    enter(chat, "/reset", ENTER, expected="all turns and files are removed")
    enter(chat, "Hello?", ENTER, expected="⟦(?s:.+)⟧")
    leave(chat, CTRL_D)
    assert chat.process.returncode == 0
    entries = json.loads((tmp_path / "chat.json").read_text())["conversation"]
    assert [entry.get("question") for entry in entries] == [None, "What is it?", "Two\nlines?"]
