"""Whatever is written into a TOML file of settings, it is read or refused with one message, without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.errors import ConfigError
from tests.conftest import fuzz_settings
from vpmoe.quickstart.settings import QuickstartError, read_settings
from vpmoe.upcycle.ladder_file import UpcycleError, geometry, read_ladder
from vpmoe.upcycle.runner import job_and_settings

HOSTILE = [
    *("9" * 5000, "-1", "0", "1e30", "-0.0", "inf", "-nan", "99999999999999", "true", '""', '" "', '"a\\u0000b"'),
    *("[" * 3000, "[" * 90 + "]" * 90, "{}", "{a = 1}", "[[], {}]", "1979-05-27", "07:32:00", '"../../x"', '"null"'),
    *('"x"\n[objects."../up"]\nrung = 1', '"x"\n' + "a." * 3000 + "b = 1", '"' + "long" * 2000 + '"'),
]


@pytest.fixture(scope="module")
def files(repository: Path) -> dict[str, list[str]]:
    names = ("nano/quickstart.toml", "nano/ladder.toml", "upcycle/ladder.toml")
    return {name: (repository / "configs" / name).read_text().splitlines() for name in names}


@pytest.mark.slow
@fuzz_settings(60)
@given(data=st.data(), text=st.sampled_from(HOSTILE) | st.text(max_size=9))
def test_any_value_of_a_setting(
    data: st.DataObject,
    text: str,
    files: dict[str, list[str]],
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(repository)  # as the paths in a ladder are
    name = data.draw(st.sampled_from(sorted(files)))
    lines = files[name]
    number = data.draw(st.sampled_from([n for n, line in enumerate(lines) if line.partition("#")[0].count("=") == 1]))
    changed = [*lines[:number], f"{lines[number].partition('=')[0]}= {text}", *lines[number + 1 :]]
    path = tmp_path / "settings.toml"
    path.write_text("\n".join(changed), encoding="utf-8", errors="replace")
    try:
        if "ladder" not in name:
            read_settings(path)
            return
        ladder = read_ladder(path)
        for spec in ladder.objects.values():
            geometry(spec)
            if not spec.is_source:
                job_and_settings(ladder, spec)
    except (QuickstartError, UpcycleError, ConfigError) as error:
        assert len(str(error)) < 20_000


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("per_family = ", "per_family = 1e30 #", "evaluation.per_family = 1e+30: a number is at most"),
        ("per_family = ", "per_family = 0 #", "evaluation.per_family = 0: must be at least 1"),
        ("per_family = ", "per_family = 1979-05-27 #", "no setting is a date"),
        ("per_family = ", f"per_family = {'[' * 50}{']' * 50} #", "nested more than 10 deep"),
        ("accuracy = ", "accuracy = -0.0 #", "0 has no sign"),
        ("accuracy = ", "accuracy = nan #", "accuracy = nan"),
        ('config = "', 'config = "\\u0000', "no text holds NUL"),
        ('config = "', 'config = " " #', "training.config = ' ': must not be blank"),
        ('run_name = "', 'run_name = "../', "training.run_name = '../"),
    ],
)
def test_the_value_and_its_place_are_named(tmp_path: Path, repository: Path, old: str, new: str, expected: str) -> None:
    text = (repository / "configs" / "nano" / "quickstart.toml").read_text()
    assert f"\n{old}" in text
    path = tmp_path / "settings.toml"
    path.write_text(text.replace(f"\n{old}", f"\n{new}", 1))
    with pytest.raises(QuickstartError) as caught:
        read_settings(path)
    assert expected in str(caught.value)
