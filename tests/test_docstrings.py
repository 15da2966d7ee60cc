"""The examples in docstrings of public functions, each run in a separate folder."""

import doctest
import inspect

import pytest

import vllama_jax as vl
from vllama_jax.convert.export import export

SLOW = pytest.mark.slow
DOCUMENTED = [
    vl.load,
    pytest.param(vl.Chat, marks=SLOW),
    vl.save,
    vl.embed_files,
    pytest.param(vl.train.train, marks=SLOW),
    pytest.param(vl.convert.convert, marks=SLOW),
    export,
]


@pytest.mark.slow
@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda found: found.__name__)
def test_docstring_examples_are_correct(documented, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(documented), {}, documented.__name__, None, None)
    assert len(test.examples) >= 3
    printed: list[str] = []
    doctest.DocTestRunner().run(test, out=printed.append)
    assert not printed, "".join(printed)
