"""Make all patches anew after the scripts have changed:

    python tests/changes/renew.py

Each patch is applied to a copy of the scripts, if need be with one line of context where it has
two, and its fresh diff is written under its old head. A patch that cannot be applied is named and
stays as it is: change the scripts by hand as it says, and write `git diff -U2` under its head.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHANGES = Path(__file__).resolve().parent
DIFF = ["diff", "-U2", "--no-color", "--no-ext-diff", "--src-prefix=a/", "--dst-prefix=b/"]


def renewed(patch):
    """The text of a patch against the scripts as they are now; None if it does not apply."""
    head = patch.read_text(encoding="utf-8").partition("diff --git")[0]
    with tempfile.TemporaryDirectory() as folder:
        def git(*words):
            return subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True)

        for script in CHANGES.parent.parent.glob("*.py"):
            shutil.copy(script, folder)
        git("init")
        git("add", ".")  # what the diff is taken against
        try:
            git("apply", "-C1", patch)
        except subprocess.CalledProcessError:
            return None
        lines = git(*DIFF).stdout.decode("utf-8").splitlines(keepends=True)
    # Hashes of whole scripts would change with every edit, and say nothing to a reader
    return head + "".join(line for line in lines if not line.startswith("index "))


def main():
    failed = []
    for patch in sorted(CHANGES.glob("*.patch")):
        if text := renewed(patch):
            patch.write_text(text, encoding="utf-8", newline="\n")
        else:
            failed.append(patch.name)
    if failed:
        sys.exit(f"these no longer apply: {', '.join(failed)}")


if __name__ == "__main__":
    main()
