"""What a user types: typed, or one line that names the key to change."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from everstep.dataset.prepare import prepare
from everstep.dataset.prepare.options import FORMATS, KEYS, PrepareOptions, parse
from everstep.dataset.prepare.plan import bare
from everstep.errors import ConfigError


def test_words_become_typed_options() -> None:
    options = parse(["src=[a,'b/**/*.txt']", "dst=D", "pack=8", "tokenizer=bytes", "dedup=true", "validation=0.1"])
    assert (options.src, options.pack, options.dedup, options.validation) == (["a", "b/**/*.txt"], 8, True, 0.1)
    assert parse(["src=*.txt", "dst=D", "columns=null"]).columns is None
    assert set(KEYS) == set(PrepareOptions.__dataclass_fields__)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dst=D"], "src= is missing"),
        (["src=a"], "dst= is missing"),
        (["src=a", "dst=D", "colums=[a]"], "no key 'colums'; did you mean 'columns'"),
        (["src=a", "dst=D", "--force"], "cannot read '--force': write key=value"),
        (["src=a", "src=b", "dst=D"], r"src is given twice; a list is src=\[a,b\]"),
        (["src=a", "dst=D", "pack=much"], "pack=much: .*could not be converted to Integer"),
        (["src=a", "dst=D", "pack=8"], "pack=8 cuts tokens: give tokenizer="),
        (["src=a", "dst=D", "format=parket"], "format=parket is none of .*did you mean 'parquet'"),
        (["src=a", "dst=D", "compression=gzip"], "compression=gzip is none of none, lz4, zstd"),
        (["src=a", "dst=D", "validation=1"], "validation=1 must be below 1"),
        (["src=a", "dst=D", "processes=0"], "processes=0 must be at least 1"),
        (["src=a", "dst=D", "tokenizer=bpe"], "tokenizer=bpe: write bytes, tiktoken:NAME"),
        (["src=a", "dst=D", "format=generator"], "src=a: with format=generator write package.module:function"),
        (["src=os:nope", "dst=D", "format=generator"], "src=os:nope cannot be imported"),
    ],
)
def test_what_is_mistyped_is_one_line_with_the_key_to_change(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said) as caught:
        prepare(parse(words))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a"]


def test_the_page_on_data_knows_every_key_and_its_commands_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in (*KEYS, *FORMATS):
        assert f"`{name}`" in page, name
    commands = [line.split("#")[0] for line in page.splitlines() if line.startswith("    everstep data prepare")]
    assert len(commands) > 4
    for command in commands:
        parse(shlex.split(command)[3:])


def test_credentials_in_a_url_do_not_get_into_the_index(tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/host/x.txt", b"line\n")
    index = prepare(PrepareOptions(src=["memory://host/x.txt"], dst=str(tmp_path / "set")))[""]
    assert index.attributes["src"] == ["memory://host/x.txt"]
    for typed, told in (
        ("s3://key:SECRET@bucket/a/*.csv", "s3://bucket/a/*.csv"),
        ("https://host/x.csv?sig=SECRET", "https://host/x.csv"),
        ("a/b@c.csv", "a/b@c.csv"),
    ):
        assert bare(typed) == told
