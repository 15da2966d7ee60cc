"""What each process of a job shows and logs: process 0 has the only display, and --log-dir a file for each process."""

import logging

from vllama_jax.cli._logs import configure_logging, log_to_file
from vllama_jax.cli._training_display import show_training

METRICS = {"step": 1, "loss": 2.0, "seconds": 0.5, "samples_per_second": 8, "waited_for_data": 0.25}


def report(process: int) -> None:
    with show_training(10, process) as reporter:
        reporter.show_message("resuming from step 4")
        reporter.begin(0)
        reporter.step(METRICS)


def test_only_process_0_shows_progress_and_every_process_logs(tmp_path, capsys):
    for process in (0, 1):
        with configure_logging():
            log_to_file(tmp_path / "logs", process, 2)
            report(process)
            logging.getLogger("vllama_jax.train").warning("a warning")
    shown = capsys.readouterr().err
    assert shown.count("resuming from step 4") == 1
    assert shown.count("1/10 steps") == 1
    assert shown.count("vllama: a warning") == 2
    for process in (0, 1):
        lines = (tmp_path / f"logs/process_{process}.log").read_text().splitlines()
        assert f" process {process} of 2 (" in lines[0]
        assert lines[1].endswith("resuming from step 4")
        assert "1/10 steps  loss 2.0000  8.0 samples/s  data wait 25%" in lines[2]
        assert lines[3].endswith(" a warning")


def test_without_a_log_directory_other_processes_are_silent(capsys):
    with configure_logging():
        report(1)
    assert capsys.readouterr() == ("", "")
    assert not logging.getLogger("vllama_jax").handlers
