"""Print the bash and python blocks of a Markdown page as one bash script, in order.

The script prints each block before it runs, with the seconds since the start.
"""

import re
import shlex
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

for language, code in BLOCK.findall(Path(sys.argv[1]).read_text()):
    print(f"printf -- '--- after %d s: %s\\n' $SECONDS {shlex.quote(code)}")
    print(code if language == "bash" else f"python -c {shlex.quote(code)}")
