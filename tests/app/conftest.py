"""One world for all tests of the app: a tiny trained run, the app over it, and a browser that looks at it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.app.app_world import Served, World, make_world, start

BROWSER, DRIVER = "chromium", "chromedriver"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("runs_whose_paths_are_longer_than_a_list_is_wide"))


@pytest.fixture(scope="session")
def served(world: World) -> Iterator[Served]:
    app = start(world)
    yield app
    app.process.send_signal(signal.SIGINT)
    assert app.process.wait(timeout=20) == 0


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A headless Chromium of the system; with VPMOE_REQUIRE_BROWSER=1 a missing one fails."""
    missing = [name for name in (BROWSER, DRIVER) if shutil.which(name) is None]
    if missing:
        reason = f"no {' and no '.join(missing)} here: apt-get install chromium chromium-driver"
        if os.environ.get("VPMOE_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which(BROWSER) or ""
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
    ):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which(DRIVER)))
    yield driver
    driver.quit()
