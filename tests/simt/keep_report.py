"""A compiler launcher: `keep_report.py nvcc ... -o x.o` runs the command, and x.o.txt has what the compiler said."""

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
done = subprocess.run(command, capture_output=True, text=True)
sys.stdout.write(done.stdout)
sys.stderr.write(done.stderr)
if done.returncode == 0 and "-o" in command:
    Path(command[command.index("-o") + 1] + ".txt").write_text(done.stderr)
sys.exit(done.returncode)
