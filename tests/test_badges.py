"""tools/stamp_badges.py, and that the committed badges are alive: what it would stamp, or none."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import stamp_badges

COLAB = "https://colab.research.google.com/github/"
NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": ["# 1. A title\n", "\n", "**You will learn** – much."]},
        {"cell_type": "markdown", "metadata": {}, "source": ["## Setup"]},
    ],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}
README = """# Series

![A picture](figures/a.png) of [notebook 1](notebooks/01_first.ipynb)

| notebook | minutes |
|---|---|
| [1. First](notebooks/01_first.ipynb) | 1 |
| [2. Second](notebooks/02_second.ipynb) | 2 |
"""
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def check():
    """Fails on a badge that is not what the tool stamps. Returns what is left unknown, if anything."""
    assert not any(COLAB in text for text in stamp_badges.texts().values()), "a badge that `make badges` cannot remove"
    readme = (stamp_badges.ROOT / "README.md").read_text(encoding="utf-8")
    committed = {path: path.read_text(encoding="utf-8") for path in stamp_badges.texts()}
    badges = re.findall(rf"{COLAB}([\w.-]+/[\w.-]+)/blob/([^/)]+)/", "".join(committed.values()))
    if not badges:
        assert committed == stamp_badges.texts(), "remains of badges: make badges"
        return None
    assert len(set(badges)) == 1, f"badges for several repositories or tags, {set(badges)}: make badges"
    repository, tag = badges[0]
    names = re.findall(rf"{COLAB}{repository}/blob/{tag}/notebooks/([^)]+)\)", readme)
    assert set(names) <= {path.name for path in stamp_badges.notebooks()}, "a badge without its notebook: make badges"
    assert committed == stamp_badges.texts(repository, tag, names), "not what is stamped: make badges"
    remotes = [stamp_badges.git("remote", "get-url", name) for name in (stamp_badges.git("remote") or "").split()]
    known = {stamp_badges.on_github(url) for url in remotes} - {None}
    assert not known or repository in known, (
        f"badges for {repository}, which is no remote: make badges, or in a fork of it "
        f"git remote add upstream https://github.com/{repository}.git"
    )
    if not stamp_badges.git("rev-parse", "--verify", f"refs/tags/{tag}"):
        return f"what {tag} holds is not known here: git fetch --tags"
    assert set(names) == set(stamp_badges.held(tag)), f"not the notebooks that {tag} holds: make badges"
    for name in names:
        assert stamp_badges.fetch_is_in_tag(repository, tag, name), f"commit the badges, then git tag -f {tag}"
    return None if known else f"no remote on GitHub: whether {repository} is the right one is not known here"


def test_the_committed_badges_are_alive():
    unknown = check()
    if unknown:
        pytest.skip(f"the badges agree, but {unknown}")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small repository with one commit, no remote and no tag."""
    root = tmp_path / "series"
    (root / "notebooks").mkdir(parents=True)
    (root / "figures" / "results").mkdir(parents=True)
    (root / "figures" / "results" / "01_runs.jsonl").write_text("{}\n")
    (root / "clr_utils.py").write_text("import numpy\n")
    (root / "README.md").write_text(README)
    for name in ("01_first.ipynb", "02_second.ipynb"):
        text = json.dumps(NOTEBOOK, indent=1, ensure_ascii=False) + "\n"
        (root / "notebooks" / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(stamp_badges, "ROOT", root)
    git("init", "--quiet")
    commit()
    return root


def git(*arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=stamp_badges.ROOT, check=True, capture_output=True)


def commit():
    git("add", ".")
    git("commit", "--quiet", "--message", "state")


def contents(folder):
    return {path: path.read_bytes() for path in [folder / "README.md", *sorted((folder / "notebooks").iterdir())]}


@pytest.fixture
def published(folder):
    """The repository with its badges at v1, as the docstring of the tool says."""
    git("remote", "add", "origin", "https://github.com/someone/series.git")
    git("tag", "v1")
    stamp_badges.main([])
    commit()
    git("-c", "tag.gpgsign=false", "tag", "--force", "v1")
    return folder


@needs_git
def test_stamps_the_readme_and_every_notebook(published):
    address = f"{COLAB}someone/series/blob/v1/notebooks/01_first.ipynb"
    image = "![Open this notebook in Google Colab](https://colab.research.google.com/assets/colab-badge.svg)"
    readme = (published / "README.md").read_text(encoding="utf-8")
    assert f"| [1. First](notebooks/01_first.ipynb) [{image}]({address}) | 1 |\n" in readme
    assert readme.count(COLAB) == 2
    text = (published / "notebooks" / "01_first.ipynb").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
    title, _, badge, _, promise = json.loads(text)["cells"][0]["source"]
    assert title == "# 1. A title\n" and badge.startswith(f"[{image}]({address}) ") and "You will learn" in promise
    assert "https://raw.githubusercontent.com/someone/series/v1/clr_utils.py" in badge
    assert check() is None


@needs_git
@pytest.mark.skipif(os.name == "nt", reason="the command is for Colab, whose shell is that of Linux")
def test_the_stamped_command_fetches_what_a_notebook_needs(published, tmp_path, monkeypatch):
    first = json.loads((published / "notebooks" / "01_first.ipynb").read_text(encoding="utf-8"))["cells"][0]
    command = re.search("`!(.+?)`", "".join(first["source"]))[1]
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")  # in place of GitHub, the folder
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{published.as_uri()}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/someone/series.git")
    colab = tmp_path / "content"
    (colab / "sample_data").mkdir(parents=True)
    subprocess.run(command, shell=True, cwd=colab, check=True, capture_output=True)
    for path in ("clr_utils.py", "figures/results/01_runs.jsonl", "notebooks/01_first.ipynb"):
        assert (colab / path).read_bytes() == (published / path).read_bytes()


@needs_git
def test_a_second_time_changes_nothing_and_another_tag_replaces(published, capsys):
    before = contents(published)
    stamp_badges.main([])
    assert "2 badges, 0 files changed\n" in capsys.readouterr().out and contents(published) == before
    git("tag", "v2.0")
    stamp_badges.main(["--tag", "v2.0"])
    assert "git tag -f v2.0" in capsys.readouterr().out  # a reader would find the command for v1
    with pytest.raises(AssertionError, match="git tag -f v2.0"):
        check()
    after = contents(published)
    assert after == {
        path: text.replace(b"/v1/", b"/v2.0/").replace(b" v1 ", b" v2.0 ") for path, text in before.items()
    }


@needs_git
@pytest.mark.parametrize("url", [None, "https://example.org/someone/series.git"])
def test_without_a_repository_on_github_the_badges_go(published, url, capsys):
    git("remote", "remove", "origin")
    assert "no remote" in check()
    if url:
        git("remote", "add", "origin", url)
    stamp_badges.main([])
    assert "origin is not a GitHub repository, so there are no badges: 3 files changed\n" in capsys.readouterr().out
    assert (published / "README.md").read_text(encoding="utf-8") == README
    for path in stamp_badges.notebooks():
        assert json.loads(path.read_text(encoding="utf-8")) == NOTEBOOK
    assert check() is None


@needs_git
@pytest.mark.parametrize(
    "tags, arguments, complaint",
    [
        ([], [], "git tag v1"),
        ([], ["--tag", "v1"], "'v1' is none here"),
        (["v/1"], [], "without slashes"),
    ],
)
def test_nothing_is_stamped_without_a_tag_that_a_badge_can_hold(folder, tags, arguments, complaint):
    git("remote", "add", "origin", "https://github.com/someone/series.git")
    for tag in tags:
        git("tag", tag)
    before = contents(folder)
    with pytest.raises(SystemExit, match=complaint):
        stamp_badges.main(arguments)
    assert contents(folder) == before


@needs_git
def test_no_badge_for_a_notebook_that_the_tag_does_not_hold(published):
    third = published / "notebooks" / "03_third.ipynb"
    shutil.copyfile(published / "notebooks" / "01_first.ipynb", third)
    with pytest.raises(AssertionError, match="not what is stamped"):
        check()
    before = contents(published)
    with pytest.raises(SystemExit, match="v1 lacks what is needed for 03_third.ipynb"):
        stamp_badges.main([])
    assert {path for path, text in contents(published).items() if text != before[path]} == {third}
    assert COLAB not in third.read_text(encoding="utf-8") and check() is None


@needs_git
def test_no_badge_at_a_tag_without_the_helper(published):
    git("rm", "--quiet", "clr_utils.py")
    git("commit", "--quiet", "--message", "without it")
    git("tag", "v2")
    with pytest.raises(SystemExit, match="v2 lacks what is needed for 01_first.ipynb, 02_second.ipynb"):
        stamp_badges.main(["--tag", "v2"])
    assert not any(COLAB.encode() in text for text in contents(published).values())


@needs_git
def test_a_stale_or_dead_badge_is_found(published):
    readme = published / "README.md"
    stamped = readme.read_text(encoding="utf-8")
    git("tag", "--delete", "v1")
    assert "git fetch --tags" in check()  # as in a shallow clone
    for old, new, complaint in [
        ("blob/v1/notebooks/02", "blob/v0/notebooks/02", "several"),
        ("02_second.ipynb)", "03_gone.ipynb)", "without its notebook"),
        ("/v1/notebooks/02_second", "/v1/notebooks/01_first", "not what is stamped"),
        ("# Series", f"# Series\n\n<a href='{COLAB}someone/series/blob/v1/README.md'>", "cannot remove"),
    ]:
        readme.write_text(stamped.replace(old, new), encoding="utf-8")
        with pytest.raises(AssertionError, match=complaint):
            check()
    readme.write_text(stamped, encoding="utf-8")
    (published / "notebooks" / "02_second.ipynb").rename(published / "notebooks" / "02_renamed.ipynb")
    with pytest.raises(AssertionError, match="without its notebook"):
        check()


@needs_git
def test_badges_of_another_repository_are_stale_except_in_a_fork(published):
    git("remote", "set-url", "origin", "git@github.com:other/series.git")
    with pytest.raises(AssertionError, match="git remote add upstream"):
        check()
    git("remote", "add", "upstream", "https://github.com/someone/series.git")
    assert check() is None


@pytest.mark.parametrize(
    "url, repository",
    [
        ("https://github.com/some-one/a.b.git", "some-one/a.b"),
        ("https://github.com/someone/series", "someone/series"),
        ("https://user:secret@github.com/someone/series.git", "someone/series"),
        ("git@github.com:someone/series.git", "someone/series"),
        ("ssh://git@github.com/someone/series.git", "someone/series"),
        ("https://notgithub.com/someone/series.git", None),
        ("https://example.org/github.com/someone/series.git", None),
        ("../series", None),
        (None, None),
    ],
)
def test_addresses_on_github(url, repository):
    assert stamp_badges.on_github(url) == repository


@needs_git
def test_no_badge_at_a_tag_without_the_recorded_results(published):
    git("rm", "--quiet", "-r", "figures/results")
    git("commit", "--quiet", "--message", "without them")
    git("tag", "v2")
    with pytest.raises(SystemExit, match="v2 lacks what is needed for 01_first.ipynb, 02_second.ipynb"):
        stamp_badges.main(["--tag", "v2"])
