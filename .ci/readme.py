"""Prints the bash and python blocks of a page as one bash script, in order, each shown before it runs."""

import re
import shlex
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

for language, code in BLOCK.findall(Path(sys.argv[1]).read_text()):
    print(f"printf '%s\\n' {shlex.quote('--- ' + code)}")
    print(code if language == "bash" else f"python -c {shlex.quote(code)}")
