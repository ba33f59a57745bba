from __future__ import annotations

import stat
from pathlib import Path

import pytest

from orchestrator.cli.main import main
from orchestrator.cluster.join_string import JoinString
from orchestrator.cluster.tokens import HANDED_OVER, hide_token, new_token, read_place, read_token_file, write_token
from orchestrator.errors import UserError

PLACE = JoinString(host="10.0.0.1", port=4321, token=new_token())


def test_the_token_leaves_the_command_line_and_is_found_again(tmp_path: Path) -> None:
    command = ["python", "-m", "orchestrator.cli.main", "join", str(PLACE), "--workers", "2"]
    hidden = hide_token(PLACE, command, tmp_path)
    assert not any(PLACE.token in argument for argument in hidden)
    assert hidden[:5] == [*command[:4], "10.0.0.1:4321"]
    assert hidden[5] == "--token-file"
    assert hidden[7:] == command[5:]
    file = Path(hidden[6])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert read_place(hidden[4], file, {}) == PLACE
    assert not file.exists()
    assert not file.parent.exists()


def test_a_mistake_in_another_option_leaves_no_token_behind(tmp_path: Path) -> None:
    path = tmp_path / HANDED_OVER / "1"
    path.parent.mkdir()
    write_token(path, PLACE.token)
    assert main(["join", PLACE.door, "--token-file", str(path), "--devices", "tpu"]) == 2
    assert not path.parent.exists()


def test_the_token_leaves_an_option_of_the_command_line(tmp_path: Path) -> None:
    hidden = hide_token(PLACE, ["atoll", "submit", "demo", f"--address={PLACE}", "--json"], tmp_path)
    assert hidden[:5] == ["atoll", "submit", "demo", "--address=10.0.0.1:4321", "--token-file"]
    assert hidden[6:] == ["--json"]
    assert read_token_file(Path(hidden[5])) == PLACE.token


def test_a_token_file_of_the_user_stays(tmp_path: Path) -> None:
    write_token(tmp_path / "token", PLACE.token)
    assert read_token_file(tmp_path / "token") == PLACE.token
    assert (tmp_path / "token").exists()


def test_where_a_token_comes_from(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{PLACE.token}\n")
    assert read_place(str(PLACE), None, {"ATOLL_TOKEN": "other"}) == PLACE
    assert read_place(PLACE.door, tmp_path / "token", {"ATOLL_TOKEN": new_token()}) == PLACE
    assert read_place(PLACE.door, None, {"ATOLL_TOKEN": PLACE.token}) == PLACE


def test_without_a_token_the_ways_to_give_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its token is missing") as caught:
        read_place(PLACE.door, None, {})
    assert "--token-file" in str(caught.value.remedy)
    with pytest.raises(UserError, match="cannot be read"):
        read_place(PLACE.door, tmp_path / "none", {})
    with pytest.raises(UserError, match="64 hexadecimal digits") as caught:
        read_place(PLACE.door, None, {"ATOLL_TOKEN": "secret"})
    assert "secret" not in str(caught.value)


def test_tokens_differ() -> None:
    assert len({new_token() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "text", [f"{PLACE.token}@10.0.0.1:4321", f"http://{PLACE.token}@10.0.0.1:4321"], ids=["bare", "http"]
)
def test_a_join_string_without_its_beginning_is_told_and_its_token_is_not(text: str) -> None:
    with pytest.raises(UserError, match="does not begin with atoll://") as caught:
        read_place(text, None, {})
    assert PLACE.token not in str(caught.value)
