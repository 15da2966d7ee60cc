"""The commands, the JobSet and the Slurm script of docs/pods.md: they parse, and stop and restart as described."""

import importlib
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from vllama_jax.cli import _usage

yaml = pytest.importorskip("yaml")
PAGE = (Path(__file__).parents[1] / "docs/pods.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
STUB = """#!/bin/bash
echo "$@" > "{folder}/arguments"
trap 'echo saved; exit 0' TERM
touch "{folder}/started"
for _ in {{1..100}}; do [[ -e "{folder}/finish" ]] && exit $(cat "{folder}/finish"); sleep 0.1; done
"""


def block(language: str, containing: str = "") -> str:
    (found,) = [code for kind, code in BLOCKS if kind == language and containing in code]
    return found


@pytest.fixture(scope="module")
def pod() -> dict:
    jobset = yaml.safe_load(block("yaml"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def train_commands(code: str) -> list[list[str]]:
    """The words of each `vllama train` in a shell script, also within quotes."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        found += [command for word in words if "vllama train" in word for command in train_commands(word)]
        if ("vllama", "train") in itertools.pairwise(words):
            start = words.index("vllama")
            end = words.index("&", start) if "&" in words[start:] else len(words)
            found.append(words[start + 1 : end])
    return found


def jobset_script() -> str:
    jobset = yaml.safe_load(block("yaml"))
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    return container["args"][0]


def all_train_commands() -> list[list[str]]:
    scripts = [code for kind, code in BLOCKS if kind in ("sh", "slurm")]
    commands = [command for script in [*scripts, jobset_script()] for command in train_commands(script)]
    return [command for command in commands if "--distributed" in command]


@pytest.mark.parametrize("words", all_train_commands(), ids=lambda words: words[words.index("--out") + 1])
def test_commands_have_real_options(words):
    assert words[0] == "train"
    module = importlib.import_module("vllama_jax.cli.train")
    _usage.parse(*module.select_command(words[1:]))


def test_all_ways_to_launch_have_a_command():
    assert len(all_train_commands()) == 4


def test_the_jobset_has_a_pod_for_each_host_and_a_mesh_over_all_chips(pod):
    spec = pod["template"]["spec"]
    chips = math.prod(map(int, spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    (container,) = spec["containers"]
    chips_of_pod = container["resources"]["requests"]["google.com/tpu"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert pod["completions"] == pod["parallelism"] == chips // chips_of_pod
    assert (pod["backoffLimit"], spec["restartPolicy"]) == (0, "Never")
    (words,) = train_commands(jobset_script())
    options = dict(itertools.pairwise(words))
    assert int(options["--mesh.data"]) * int(options["--mesh.fsdp"]) == chips
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def test_the_slurm_script_starts_one_process_for_each_gpu():
    script = block("slurm")
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]
    (words,) = train_commands(script)
    options = dict(itertools.pairwise(words))
    gpus = int(settings["nodes"]) * int(settings["gpus-per-node"])
    assert int(options["--mesh.data"]) * int(options["--mesh.fsdp"]) == gpus
    assert settings["signal"] == "B:TERM@120", "to the script, which has a trap"


@pytest.fixture
def run_script(tmp_path):
    """Start a script with stubs of its programs; the function sends SIGTERM, or lets the run end with a code."""

    def run(script: str, code: int | None) -> tuple[int, str]:
        for name, text in {
            "vllama": STUB.format(folder=tmp_path),
            "srun": f'#!/bin/bash\necho $$ > "{tmp_path}/srun"\nshift\nexec "$@"\n',
            "scancel": f'#!/bin/bash\nkill -TERM "$(cat {tmp_path}/srun)"\n',
            "scontrol": '#!/bin/bash\necho scontrol "$@"\n',
        }.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        with subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as process:
            while not (tmp_path / "started").exists():
                time.sleep(0.02)
            if code is None:
                process.send_signal(signal.SIGTERM)
            else:
                (tmp_path / "finish").write_text(str(code))
            output = process.communicate(timeout=60)[0]
        return process.returncode, output

    return run


@pytest.mark.parametrize(("code", "expected"), [(None, (143, "saved\n")), (0, (0, "")), (1, (1, ""))])
def test_a_pod_that_got_sigterm_saves_and_fails_so_that_the_jobset_restarts(run_script, code, expected):
    assert run_script(jobset_script(), code) == expected


@pytest.mark.parametrize(("code", "expected"), [(None, (0, "saved\nscontrol requeue 7\n")), (0, (0, "")), (1, (1, ""))])
def test_a_slurm_job_that_got_sigterm_saves_and_is_queued_again(run_script, code, expected):
    assert run_script(block("slurm"), code) == expected
