"""Ends processes of ours when this one dies without a close: vLLM's were seen to go on for ever, and to keep their memory.

A shell waits at a pipe that nobody writes to: it closes with this process, however that ends. A process is its id and the
time it began, because an id is given to another process after a while.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

# proc(5), /proc/PID/stat: after the name, which is in brackets and may hold anything, the state (field 3) and 19 fields on
# the start time (22). `signal_all` is false when none of them is left; one that has ended is left to its parent.
_SCRIPT = """
signal_all() {
  signal=$1 found=1
  for process in $processes; do
    read -r line < /proc/${process%:*}/stat || continue
    set -- ${line##*) }
    if [ "$1" != Z ] && [ "${20}" = "${process#*:}" ]; then kill -$signal ${process%:*}; found=0; fi
  done
  return $found
}
processes=$* seconds=$0
read -r _
signal_all TERM || exit 0
while [ $seconds -gt 0 ]; do sleep 1; signal_all 0 || exit 0; seconds=$((seconds - 1)); done
signal_all KILL
"""


def started_at(process_id: int) -> str:
    """When it began, in the kernel's own count. OSError: there is no such process."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(") ")[2].split()[19]


def watchdog(started: Mapping[int, str], kill_after_s: int) -> subprocess.Popen[bytes]:
    """Terminates these processes (ids with their `started_at`) when this one ends, and kills what is left in the end.

    It begins as soon as its `stdin` is closed; whoever wants them to live kills it first.
    """
    processes = [f"{process_id}:{began}" for process_id, began in started.items()]
    return subprocess.Popen(
        ["/bin/sh", "-c", _SCRIPT, str(kill_after_s), *processes],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
