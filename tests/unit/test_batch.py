"""Many runs become the elements of one job, whenever their launcher dies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig
from everstep.launch.schedulers.base import Batch, Batching, Rendered
from everstep.launch.schedulers.job import JobHandle
from everstep.launch.submit.array import ArrayMember, recover, run_of, submit_batch
from everstep.launch.submit.job_spec import JobSpec
from everstep.launch.submit.submission import submissions
from everstep.run_folder import RunFolder
from support.file_scheduler import VARIABLE, FileArrays


class Killed(BaseException):
    """The launcher dies."""


class Dying(FileArrays):
    """Its user is killed before it has heard anything, or after it has made the job."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def submit(self, rendered: Rendered) -> JobHandle:
        if self.when == "after":
            super().submit(rendered)
        raise Killed


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))


@pytest.fixture
def folders(tmp_path: Path) -> list[RunFolder]:
    return [RunFolder(str(tmp_path / f"s/trials/{name}")) for name in "abc"]


def together(folders: list[RunFolder], cluster: Batching, token: str = "first") -> list[JobHandle | str]:
    root = folders[0].url.rsplit("/", 2)[0]
    batch = Batch("s", root, token, tuple(range(len(folders))), parallel=2)
    members = [
        ArrayMember(folder, ("-m", "everstep.trainer", "--frozen", folder.url), code="code-1/.") for folder in folders
    ]
    return submit_batch(batch, members, JobConfig(scheduler="slurm"), cluster)


def jobs() -> list[str]:
    return sorted(FileArrays().known()["jobs"])


def forget_the_launcher(folders: list[RunFolder]) -> None:
    """The intents are of a process that is gone."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    for folder in folders:
        path = Path(folder.url, "submissions/0001.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "pid": pid}))


def test_each_run_has_an_element_that_finds_its_folder_in_the_list(folders: list[RunFolder], tmp_path: Path) -> None:
    handles = together(folders, FileArrays())
    assert [str(handle) for handle in handles] == [f"slurm://file/1_{number}" for number in range(3)]
    assert [submissions(folder)[-1].handle for folder in folders] == handles
    found = [run_of(f"{tmp_path}/s/batches/first.txt", number)[0] for number in range(3)]
    assert found == [folder.url for folder in folders]
    assert JobSpec.read(folders[1]).argv == ("-m", "everstep.trainer", "--frozen", folders[1].url)
    assert JobSpec.read(folders[1]).code == "code-1/."


def test_what_waits_or_runs_is_not_submitted_again(folders: list[RunFolder]) -> None:
    cluster = FileArrays()
    together(folders[:2], cluster)
    assert [str(handle).rsplit("/", 1)[1] for handle in together(folders, cluster, "second")] == ["1_0", "1_1", "3_2"]
    assert jobs() == ["1_0", "1_1", "3_2"]


def test_one_question_tells_which_runs_have_a_job(folders: list[RunFolder]) -> None:
    cluster = FileArrays()
    together(folders, cluster)
    before = cluster.known()["queries"]
    together(folders, cluster, "second")
    assert cluster.known()["queries"] == before + 1


def test_a_launcher_that_dies_before_the_job_is_made_leaves_the_way_free(folders: list[RunFolder]) -> None:
    with pytest.raises(Killed):
        together(folders, Dying("before"))
    forget_the_launcher(folders)
    recover(folders, FileArrays())
    assert [submissions(folder)[-1].is_settled for folder in folders] == [True] * 3
    together(folders, FileArrays(), "second")
    assert jobs() == ["1_0", "1_1", "1_2"]
    assert [submissions(folder)[-1].number for folder in folders] == [2] * 3


def test_a_launcher_that_dies_after_the_job_is_made_is_followed_by_one_that_finds_its_elements(
    folders: list[RunFolder],
) -> None:
    with pytest.raises(Killed):
        together(folders, Dying("after"))
    forget_the_launcher(folders)
    recover(folders, FileArrays())
    assert [str(submissions(folder)[-1].handle) for folder in folders] == [f"slurm://file/1_{n}" for n in range(3)]
    together(folders, FileArrays(), "second")
    assert jobs() == ["1_0", "1_1", "1_2"]


def test_a_single_run_of_such_a_launcher_is_found_by_the_token_of_its_element(folders: list[RunFolder]) -> None:
    with pytest.raises(Killed):
        together(folders, Dying("after"))
    assert str(FileArrays().find(submissions(folders[2])[-1].token)) == "slurm://file/1_2"


def test_a_launcher_that_still_lives_is_waited_for(folders: list[RunFolder]) -> None:
    with pytest.raises(Killed):
        together(folders, Dying("before"))
    with pytest.raises(ConfigError, match=f"is being submitted by process {os.getpid()} on "):
        recover(folders, FileArrays())


def test_a_refusal_leaves_the_way_free(folders: list[RunFolder]) -> None:
    class Refusing(FileArrays):
        def submit(self, rendered: Rendered) -> JobHandle:
            raise ConfigError("sbatch refused the job: no such partition")

    with pytest.raises(ConfigError, match="no such partition"):
        together(folders, Refusing())
    together(folders, FileArrays(), "second")
    assert jobs() == ["1_0", "1_1", "1_2"]


def test_an_answer_that_got_lost_is_looked_for(folders: list[RunFolder]) -> None:
    class Deaf(FileArrays):
        def submit(self, rendered: Rendered) -> JobHandle:
            super().submit(rendered)
            raise ConfigError("sbatch refused the job: Socket timed out")

    assert [str(handle) for handle in together(folders, Deaf())] == [f"slurm://file/1_{n}" for n in range(3)]


def test_a_run_that_another_launcher_is_submitting_is_left_out(folders: list[RunFolder]) -> None:
    class Late(FileArrays):
        """While the others are looked at, somebody resumes the second run by hand."""

        def status(self, handles: object) -> dict[JobHandle, object]:  # type: ignore[override]
            folders[1].storage.create("submissions/0001.json", b"{}")
            return {}

    handles = together(folders, Late())
    assert isinstance(handles[1], str)
    assert "another launcher is submitting" in handles[1]
    assert jobs() == ["1_0", "1_2"]


def test_a_launcher_that_was_taken_for_dead_cancels_the_elements_that_went_on_without_it(
    folders: list[RunFolder],
) -> None:
    class Slow(FileArrays):
        def submit(self, rendered: Rendered) -> JobHandle:
            submissions(folders[0])[-1].settle(None)
            return super().submit(rendered)

    handles = together(folders, Slow())
    assert isinstance(handles[0], str)
    assert {id: job["state"] for id, job in FileArrays().known()["jobs"].items()} == {
        "1_0": "cancelled", "1_1": "pending", "1_2": "pending"}  # fmt: skip


def test_an_element_without_a_line_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("/runs/a\n")
    with pytest.raises(ConfigError, match="has 1 lines and none for element 1 of the array"):
        run_of(f"{tmp_path}/list", 1)
    with pytest.raises(ConfigError, match="there is no such list"):
        run_of(f"{tmp_path}/other", 0)
