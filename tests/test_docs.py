"""What the documents name is there: options, commands and their options, files."""

import re
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from appliance.cli import cli
from appliance.config import Settings
from appliance.config.sections import DirectoryBucket, Export, S3Bucket, Site

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMED: dict[str, tuple[type[BaseModel], ...]] = {
    "sites": (Site,),
    "buckets": (S3Bucket, DirectoryBucket),
    "exports": (Export,),
}


def options() -> set[str]:
    """Every option as documents write it: of sites, buckets and exports without their names, too."""
    found = set()
    for section, field in Settings.model_fields.items():
        models = NAMED.get(section) or (field.annotation,)
        for model in models:
            assert isinstance(model, type)
            assert issubclass(model, BaseModel)
            found |= {f"{section}.{name}" for name in model.model_fields}
    return found


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_that_a_document_names_is_one(document: Path) -> None:
    named = set(re.findall(r"`((?:" + "|".join(Settings.model_fields) + r")\.\w+)`", text_of(document)))
    assert {one for one in named if not one.endswith((".py", ".json"))} <= options()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_variable_that_a_document_names_sets_an_option(document: Path) -> None:
    named = set(re.findall(r"APPLIANCE_([A-Z_]+?)(?:__\d+)?__([A-Z_]+)\b", text_of(document)))
    known = {tuple(option.upper().split(".")) for option in options()}
    assert {one for one in named if (one[0], one[1].rsplit("__")[-1]) not in known} == set()


def commands_in(text: str) -> list[list[str]]:
    """Return the words behind `appliance` where a document shows it being typed."""
    typed = "\n".join(re.findall(r"`[^`\n]+`|^ {4}.*", text, re.MULTILINE))
    lines = re.findall(r"(?m)(?:^ {4}|`|exec appliance |bin/)appliance ([a-z][a-z-]+(?: [^`\n#|]*)?)", typed)
    return [line.split() for line in lines]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_that_a_document_shows_is_one(document: Path) -> None:
    for name, *words in commands_in(text_of(document)):
        if name not in cli.commands:
            pytest.fail(f"{document.name}: there is no command appliance {name}")
        known = {option for param in cli.commands[name].params for option in [*param.opts, *param.secondary_opts]}
        shown = {re.split(r"[=\]]", word.strip("[],.;:()"))[0] for word in words if word.strip("[").startswith("--")}
        assert shown <= known | {"--help"}, f"{document.name}: appliance {name}"


def test_every_option_of_a_command_says_what_it_does() -> None:
    silent = [
        f"{name} {param.name}"
        for name, command in cli.commands.items()
        for param in command.params
        if isinstance(param, click.Option) and not param.help
    ]
    assert silent == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_links_to_is_there(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)#]*)(#[^)]*)?\)", text_of(document)):
        if target[0]:
            assert (document.parent / target[0]).exists(), target[0]


def test_every_figure_that_the_page_on_scaling_takes_from_the_measured_ones_is_one_of_them() -> None:
    table = text_of(ROOT / "docs/scaling.md").split("| --- | --- |\n", 1)[1].split("\n\n", 1)[0]
    figures = [line.split("|")[2].strip() for line in table.splitlines()]
    measured = text_of(ROOT / "docs/performance.md").split("\n## ")[0]
    known = {cell.strip() for line in measured.splitlines() for cell in line.split("|")}
    assert len(figures) > 5
    assert [figure for figure in figures if figure not in known] == []
