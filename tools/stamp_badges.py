"""Stamps the Colab badges from `git remote` and a tag; removes them where origin is not on GitHub.

    python tools/stamp_badges.py              # at the newest tag
    python tools/stamp_badges.py --tag v1.2

A badge goes into each notebook below its title, with the command that fetches clr_utils.py and the recorded results,
and into the table of README.md. It opens the notebook as the tag holds it, so the tag has to move to the stamped files:

    git tag v1 && make badges && git commit -am "Badges at v1" && git tag -f v1 && git push origin HEAD v1
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
GITHUB = r"(?:https://(?:[^@/]+@)?|git@|ssh://git@)github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?"
BADGE = r"\[!\[[^]\n]*\]\([^)\s]*\)\]\(https://colab\.research\.google\.com/github/[^)\s]*\)"
NEW_BADGE = (
    "[![Open this notebook in Google Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/{tag}/notebooks/{name})"
)
FETCH = (  # Colab opens the notebook alone, in a folder that is not empty, so one cannot clone right into it
    "In Colab, run this in a new cell first: `!git clone -q --depth 1 -b {tag} https://github.com/{repository}.git "
    "repo && cp -r repo/* .` It fetches "
    "[clr_utils.py](https://raw.githubusercontent.com/{repository}/{tag}/clr_utils.py) and the recorded results."
)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", help="default: the newest")
    tag = parser.parse_args(arguments).tag
    repository = on_github(git("remote", "get-url", "origin"))
    if not repository:
        changed = save(texts())
        print(f"origin is not a GitHub repository, so there are no badges: {changed} files changed")
        return
    tag = tag or git("describe", "--tags", "--abbrev=0") or ""
    if not re.fullmatch(r"[\w.-]+", tag) or not git("rev-parse", "--verify", f"refs/tags/{tag}"):
        sys.exit(
            f"Badges need a tag without slashes, and '{tag}' is none here: git tag v1, then again; push it with them"
        )
    names = held(tag)
    changed = save(texts(repository, tag, names))
    print(f"{repository} at {tag}: {len(names)} badges, {changed} files changed")
    if not all(fetch_is_in_tag(repository, tag, name) for name in names):
        print(f"{tag} does not hold them yet: commit, git tag -f {tag}, git push origin HEAD {tag}")
    if missing := {path.name for path in notebooks()} - set(names):
        sys.exit(f"No badge, it would be dead: {tag} lacks what is needed for {', '.join(sorted(missing))}")


def git(*arguments):
    """What git says; None where it fails or is not installed."""
    try:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def on_github(url):
    """OWNER/NAME of an address on GitHub, without the password that may be in it; None for any other."""
    found = re.fullmatch(GITHUB, url or "")
    return found and found[1]


def notebooks():
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def held(tag):
    """The names of the notebooks that the tag holds, with what their readers fetch."""

    def there(path):
        return git("cat-file", "-e", f"refs/tags/{tag}:{path}") is not None

    complete = there("clr_utils.py") and there("figures/results")
    return [path.name for path in notebooks() if complete and there(f"notebooks/{path.name}")]


def fetch_is_in_tag(repository, tag, name):
    held = git("show", f"refs/tags/{tag}:notebooks/{name}")
    return held is not None and FETCH.format(repository=repository, tag=tag) in held


def texts(repository=None, tag=None, names=()):
    """The texts of README.md and all notebooks, by path, with badges for the notebooks named and for no other."""
    badges = {name: NEW_BADGE.format(repository=repository, tag=tag, name=name) for name in names}
    readme = unstamped((ROOT / "README.md").read_text(encoding="utf-8"))
    for name, badge in badges.items():
        readme = re.sub(rf"^\| \[[^]\n]*\]\(notebooks/{re.escape(name)}\)", rf"\g<0> {badge}", readme, flags=re.M)
    stamped = {ROOT / "README.md": readme}
    for path in notebooks():
        stamped[path] = path.read_text(encoding="utf-8")
        notebook = json.loads(stamped[path])
        before = "".join(notebook["cells"][0]["source"])
        title, newline, rest = unstamped(before).partition("\n")
        if path.name in badges:
            title += f"\n\n{badges[path.name]} {FETCH.format(repository=repository, tag=tag)}"
        if title + newline + rest != before:
            notebook["cells"][0]["source"] = (title + newline + rest).splitlines(keepends=True)
            stamped[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    return stamped


def unstamped(text):
    """A text without its badges and what is said beside them."""
    return re.sub(rf"(?:\n\n| )?{BADGE}(?: In Colab[^\n]*)?", "", text)


def save(stamped):
    """Writes the texts that differ from their files. Returns how many."""
    from run_notebooks import write  # brings nbconvert, for which other users of this module need not wait

    changed = [path for path, text in stamped.items() if path.read_text(encoding="utf-8") != text]
    for path in changed:
        write(path, stamped[path])
    return len(changed)


if __name__ == "__main__":
    main()
