"""The playground in a real browser, against a small server that speaks the API without a model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from serve.playground_server import Fake, create_app, drawn, served

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
By = pytest.importorskip("selenium.webdriver.common.by").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
Keys = webdriver.Keys

CHROME, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROME and DRIVER), reason="needs chromium and chromium-driver")

PHONE, DESK = (320, 700), (1200, 900)


class Page:
    """The page in the browser, with what the tests do to it."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, query: str = "") -> None:
        """Open the page anew, as in a new tab: with no key."""
        self.driver.get(f"{self.address}/playground/playground.css")
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.get_log("browser")
        self.driver.get(f"{self.address}/{query}")

    def ready(self, query: str = "") -> None:
        """Open the page and wait for its models."""
        self.open(query)
        self.until(lambda: self.run("return document.querySelectorAll('#presets input').length"))

    def run(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def find(self, css: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, css))

    def text(self, css: str) -> str:
        return str(self.find(css).text)

    def shown(self, css: str) -> bool:
        return any(e.is_displayed() for e in self.all(css))

    def until(self, happened: Callable[[], Any], seconds: float = 15.0) -> Any:
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: happened())

    def write(self, css: str, text: str) -> None:
        field = self.find(css)
        field.clear()
        field.send_keys(text)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def draw(self, prompt: str = "cat", seed: str = "") -> None:
        """Draw and wait for the end."""
        self.write("#prompt", prompt)
        self.write("#seed", seed)
        self.find("#draw").click()
        self.until(lambda: self.text("#status").startswith("Finished"))

    def compare(self) -> None:
        self.find("#compare").click()
        self.until(lambda: self.text("#status").startswith("The full run is finished"))

    def focused(self) -> str:
        return str(self.run("return document.activeElement.id || document.activeElement.value || ''"))

    @property
    def query(self) -> dict[str, str]:
        return {n: v[0] for n, v in parse_qs(urlsplit(self.driver.current_url).query).items()}

    def faults(self) -> list[str]:
        """Errors in the browser's console, such as those of scripts and of the content security policy."""
        messages = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [m for m in messages if "Failed to load resource" not in m]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-extensions"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Fake, str]]:
    fake = Fake()
    with served(create_app(fake)) as address:
        yield fake, address


@pytest.fixture
def fake(server: tuple[Fake, str]) -> Fake:
    """The server's memory, as new."""
    server[0].__init__()  # type: ignore[misc]
    return server[0]


@pytest.fixture
def page(driver: Any, server: tuple[Fake, str], fake: Fake) -> Iterator[Page]:
    found = Page(driver, server[1])
    look(driver, DESK)
    yield found
    assert found.faults() == []


def look(driver: Any, size: tuple[int, int], **media: str) -> None:
    """Give the page's viewport a size, and media features such as `color_scheme`."""
    features = [{"name": f"prefers-{n.replace('_', '-')}", "value": v} for n, v in media.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


# ------------------------------------------------------------------------------------------------ drawing
def test_a_picture_comes_with_progress_previews_timeline_and_cost(page: Page, fake: Fake) -> None:
    page.ready()
    page.run("""
        window.steps = []; window.previews = new Set();
        new MutationObserver(() => {
          window.steps.push(document.getElementById("step").textContent);
          const image = document.querySelector("#drawings img");
          if (image?.alt === "Preview") window.previews.add(image.src);
        }).observe(document.getElementById("stage"), {subtree: true, childList: true, characterData: true});
    """)
    page.draw("a cat", seed="7")
    steps = [text for text in page.run("return window.steps") if text.startswith("Step")]
    assert steps[0] == "Step 1 of 24"
    assert steps[-1] == "Step 24 of 24"
    assert len(page.run("return [...window.previews]")) == 3
    assert not page.shown("#running")

    assert page.find("#drawings img").get_attribute("alt") == "a cat, balanced"
    page.until(lambda: page.run("return document.querySelector('#drawings img').naturalWidth") == 64)
    letters = [cell.get_attribute("class") for cell in page.all("#drawings .timeline i")]
    assert "".join(letters) == "FAAAARAA" * 3
    label = page.find("#drawings .timeline").get_attribute("aria-label")
    assert label == (
        "24 steps. Full steps: 1, 9, 17. Rejected drafts, computed in full: 6, 14, 22. The others are drafts."
    )
    said = dict(zip(page.text("dl").split("\n")[::2], page.text("dl").split("\n")[1::2], strict=True))
    assert said == {
        "Full steps": "6 of 24, 3 of them for a rejected draft", "Work": "4.00 times fewer FLOPs",
        "Time": "0.30 s, after 0.01 s of waiting", "Seed": "7",
    }  # fmt: skip
    (asked,) = fake.asked
    sent = {"model": "pictures", "prompt": "a cat", "preset": "balanced", "seed": 7, "stream": True,
            "output_format": "png", "stream_progress": True, "partial_images": 3}  # fmt: skip
    assert asked == sent
    assert page.find("#download").get_attribute("download") == "pictures-7.png"
    assert page.find("#download").get_attribute("href").startswith("blob:")


def test_all_settings_are_sent(page: Page, fake: Fake) -> None:
    page.ready()
    fields = {"negative": "dog", "guidance": "2.5", "size": "32x48", "steps": "12", "speedup": "4.5"}
    for name, value in fields.items():
        page.write(f"#{name}", value)
    page.find("#presets input[value=faithful]").find_element(By.XPATH, "..").click()
    page.draw("cat", seed="3")
    given = {"negative_prompt": "dog", "guidance_scale": 2.5, "size": "32x48", "num_inference_steps": 12,
             "speedup": 4.5, "preset": "faithful"}  # fmt: skip
    assert given.items() <= fake.asked[0].items()
    assert page.text(".notes") == "a note of the fake server."
    label = page.find("#drawings .timeline").get_attribute("aria-label")
    assert label == "12 steps. Full steps: 1, 2, 5 to 7, 9, 10. The others are drafts."


def test_the_full_run_beside_it_and_their_distance(page: Page, fake: Fake) -> None:
    page.ready()
    page.write("#speedup", "4")
    page.draw("cat")
    seed = fake.asked[0].get("seed", 1001)
    assert page.query["seed"] == str(seed), "the seed that the server chose"
    page.compare()
    full = fake.asked[1]
    assert (full["seed"], full["preset"], "speedup" in full) == (seed, "full", False)
    assert len(page.all("#drawings figure")) == 2
    one, other = (np.asarray(drawn(seed, preset), dtype=float) for preset in ("balanced", "full"))
    distance = 10 * np.log10(255**2 / np.mean((one - other) ** 2))
    assert page.text("#compared") == (
        f"PSNR between both pictures: {distance:.1f} dB. The full run took 4.0 times as long."
    )
    assert page.all("#drawings figure")[1].find_element(By.CSS_SELECTOR, "dl").text.split("\n")[1] == "24 of 24"
    assert not page.shown("#compare")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_cancel(page: Page, fake: Fake, way: str) -> None:
    page.ready()
    page.draw("cat", seed="1")
    page.write("#prompt", "slow cat")
    page.find("#draw").click()
    page.until(lambda: page.text("#step").startswith("Step 2"))
    page.find("#cancel").click() if way == "button" else page.press(Keys.ESCAPE)
    page.until(lambda: page.text("#status") == "Cancelled.")
    page.until(lambda: fake.deleted == ["requests/req_2"])
    page.until(lambda: fake.left == 1)
    assert not page.shown("#cancel")
    assert page.focused() == "draw"
    assert page.find("#drawings img").get_attribute("alt") == "cat, balanced", "the last picture is back"


def test_classes_come_from_a_list(page: Page, fake: Fake) -> None:
    page.ready("?model=garments&prompt=trouser&preset=fast")
    assert not page.shown("#prompt")
    assert not page.shown("#size")
    page.find("#class").send_keys("ankle")
    page.find("#draw").click()
    page.until(lambda: page.text("#status").startswith("Finished"))
    assert (fake.asked[0]["prompt"], fake.asked[0]["preset"]) == ("ankle boot", "fast")


# ------------------------------------------------------------------------------------------------ clips
def test_a_clip_is_a_job(page: Page, fake: Fake) -> None:
    page.ready("?model=clips")
    page.write("#seconds", "1.5")
    page.draw("rain", seed="4")
    video = page.find("#drawings video")
    assert video.get_attribute("src").startswith("blob:")
    assert fake.asked == [{"model": "clips", "prompt": "rain", "seed": "4", "seconds": "1.5", "preset": "balanced"}]
    assert page.find("#download").get_attribute("download") == "clips-4.mp4"
    page.compare()
    assert len(page.all("#drawings video")) == 2
    assert page.text("#compared") == "The full run took 4.0 times as long."

    page.write("#prompt", "slow rain")
    page.find("#draw").click()
    page.until(lambda: page.text("#step") == "90 %")
    page.press(Keys.ESCAPE)
    page.until(lambda: fake.deleted == ["videos/video_3"])

    page.write("#prompt", "broken rain")
    page.find("#draw").click()
    page.until(lambda: page.text("#problem") == "the clip failed.")


# ------------------------------------------------------------------------------------------------ address, history
def test_a_link_reproduces_the_settings(page: Page, fake: Fake) -> None:
    page.ready()
    page.write("#negative", "dog & bird")
    page.write("#steps", "8")
    page.find("#presets input[value=fast]").find_element(By.XPATH, "..").click()
    page.draw("a cat, 100% grey")
    link = urlsplit(page.driver.current_url).query
    page.ready()
    page.ready(f"?{link}")
    assert page.find("#prompt").get_attribute("value") == "a cat, 100% grey"
    page.find("#draw").click()
    page.until(lambda: page.text("#status").startswith("Finished"))
    assert fake.asked[1] == {**fake.asked[0], "seed": 1001}


def test_back_forward_and_the_list_of_drawings(page: Page) -> None:
    page.ready()
    for prompt, seed in [("cat", "1"), ("dog", "2"), ("owl", "")]:
        page.draw(prompt, seed)
    assert [e.text for e in page.all("#items button")] == ["owl, balanced", "dog, balanced", "cat, balanced"]

    def state() -> tuple[str, str, str]:
        image = page.find("#drawings img").get_attribute("alt") if page.all("#drawings img") else ""
        return page.find("#prompt").get_attribute("value"), page.find("#seed").get_attribute("value"), image

    page.driver.back()
    page.until(lambda: state() == ("dog", "2", "dog, balanced"))
    page.driver.back()
    page.driver.back()
    page.until(lambda: state() == ("", "", ""))
    assert page.shown("#empty")
    for _ in range(3):
        page.driver.forward()
    page.until(lambda: state() == ("owl", "1003", "owl, balanced"))
    page.all("#items button")[2].click()
    assert state() == ("cat", "1", "cat, balanced")
    assert page.query["prompt"] == "cat"
    assert [e.get_attribute("aria-current") for e in page.all("#items button")] == [None, None, "true"]


def test_an_unknown_model_of_a_link_is_said(page: Page) -> None:
    page.ready("?model=gone&prompt=cat")
    assert page.text("#problem") == "The model gone of the link is not served here."
    assert page.find("#model").get_attribute("value") == "pictures"
    assert page.find("#model option[value=unready]").get_attribute("disabled")


# ------------------------------------------------------------------------------------------------ errors
def test_a_refusal_is_said_at_its_field(page: Page) -> None:
    page.ready()
    page.write("#prompt", "wrong cat")
    page.find("#draw").click()
    page.until(lambda: page.text("#problem") == "size='1x1' is too small; at least 8x8.")
    assert page.focused() == "size"
    assert page.find("#size").get_attribute("aria-invalid") == "true"
    assert not page.shown("#retry")
    page.draw("cat")
    assert page.text("#problem") == ""
    assert not page.all("[aria-invalid]")


@pytest.mark.parametrize(("prompt", "sentence"), [
    ("broken cat", "the model failed."), ("cut cat", "The connection ended before the picture was finished."),
])  # fmt: skip
def test_an_error_within_the_stream(page: Page, prompt: str, sentence: str) -> None:
    page.ready()
    page.write("#prompt", prompt)
    page.find("#draw").click()
    page.until(lambda: page.text("#problem") == sentence)
    assert page.shown("#retry")
    assert page.shown("#empty")


def test_a_busy_server(page: Page, fake: Fake) -> None:
    page.ready()
    page.write("#prompt", "busy cat")
    page.find("#draw").click()
    page.until(lambda: page.text("#problem") == "too many requests are waiting.")
    assert re.fullmatch(r"The server asks to wait [12] s\.", page.text("#wait"))
    page.find("#retry").click()
    assert len(fake.asked) == 1, "too early"
    page.until(lambda: page.find("#retry").get_attribute("aria-disabled") == "false")
    page.find("#retry").click()
    page.until(lambda: page.text("#status").startswith("Finished"))
    assert len(fake.asked) == 2
    assert not page.shown("#retry")


def test_a_key_is_asked_for_only_where_it_is_needed(page: Page, fake: Fake) -> None:
    page.ready()
    assert not page.shown("#access")
    fake.key = "s3cret"
    page.open()
    page.until(lambda: page.shown("#access"))
    assert page.text("#problem") == "the API key is missing or unknown."
    assert page.focused() == "key"
    page.press("wrong", Keys.ENTER)
    page.until(lambda: page.text("#problem") and page.shown("#access"))
    page.write("#key", "s3cret")
    page.press(Keys.ENTER)
    page.until(lambda: page.all("#presets input"))
    assert not page.shown("#access")
    page.draw("cat")
    assert page.run("return [localStorage.length, document.cookie, location.search.includes('s3cret')]") == [
        0,
        "",
        False,
    ]


def test_a_server_that_is_gone(page: Page) -> None:
    page.ready()
    page.run("window.fetch = () => Promise.reject(new TypeError('network'))")
    page.write("#prompt", "cat")
    page.find("#draw").click()
    page.until(lambda: page.text("#problem") == "The server cannot be reached.")


# ------------------------------------------------------------------------------------------------ for everybody
def test_by_keyboard_alone(page: Page, fake: Fake) -> None:
    page.ready()
    seen = []
    while page.focused() != "draw":
        page.press(Keys.TAB)
        seen.append(page.focused())
        assert page.run("return getComputedStyle(document.activeElement).outlineStyle") != "none"
        if seen[-1] == "prompt":
            page.press("owl")
        elif seen[-1] == "balanced":
            page.press(Keys.ARROW_RIGHT)
        elif seen[-1] == "steps":
            page.press("10")
    order = ["", "model", "prompt", "negative", "balanced", "speedup", "steps", "seed", "guidance", "size", "draw"]
    assert seen == order, "the first is the link past the form"
    page.press(Keys.ENTER)
    page.until(lambda: page.text("#status").startswith("Finished"))
    assert (fake.asked[0]["prompt"], fake.asked[0]["preset"], fake.asked[0]["num_inference_steps"]) == (
        "owl",
        "fast",
        10,
    )
    assert page.focused() == "draw", "the focus stays"
    page.press(Keys.TAB)
    assert page.focused() == "compare"
    page.press(Keys.ENTER)
    page.until(lambda: page.text("#status").startswith("The full run is finished"))
    page.find("#prompt").send_keys(" at night", Keys.CONTROL + Keys.ENTER)
    page.until(lambda: len(fake.asked) == 3)
    assert fake.asked[2]["prompt"] == "owl at night"


def test_every_field_has_a_label_and_messages_are_announced(page: Page) -> None:
    page.ready()
    nameless = page.run("""
        return [...document.querySelectorAll("input, select, textarea, progress, button")].filter((e) =>
          !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-labelledby"))).map((e) => e.outerHTML);
    """)
    assert nameless == []
    assert page.find("#status").get_attribute("role") == "status"
    assert page.find("#problem").get_attribute("role") == "alert"
    assert page.run("return document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_fits_and_can_be_read(page: Page, size: tuple[int, int], scheme: str) -> None:
    look(page.driver, size, color_scheme=scheme, reduced_motion="reduce")
    page.ready("?steps=100")
    page.write("#steps", "100")
    page.draw("a" * 90, seed="5")
    page.compare()
    top = page.run("return document.getElementById('stage').getBoundingClientRect().top")
    assert top < size[1] / 2, "the result comes into view"
    width = page.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1] == size[0]
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.2) == (scheme == "dark")
    for css, least in [("h1", 4.5), (".help", 4.5), ("#draw", 4.5), ("dt", 4.5), ("#compared", 4.5)]:
        assert contrast(page, css) >= least, css
    strip = page.run("return [...document.querySelectorAll('.timeline')].map(e => e.getBoundingClientRect().width)")
    assert all(200 < w <= size[0] for w in strip)
    assert page.run("return getComputedStyle(document.getElementById('draw')).transitionDuration") == "0s"


def contrast(page: Page, css: str) -> float:
    """Contrast of an element's text with the first background behind it."""
    colours = page.run("""
        let e = document.querySelector(arguments[0]);
        const text = getComputedStyle(e).color;
        while (getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)") e = e.parentElement;
        return [text, getComputedStyle(e).backgroundColor];
    """, css)  # fmt: skip
    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of a colour, as the Web Content Accessibility Guidelines define it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))
