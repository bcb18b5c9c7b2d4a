"""The page of serve.py in a real Chromium, driven by Selenium (Debian: apt install chromium chromium-driver)."""

import shutil

import pytest

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_serve import ABOUT, ask, serving

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def url():
    with serving() as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page, freshly opened, with what a person does on it."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get_log("browser")  # empties it
        browser.get(url)
        self.wait(lambda: self.all("#examples button"))

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.browser.execute_script(
            "return document.querySelector(arguments[0]).textContent", selector
        )

    def wait(self, condition):
        return WebDriverWait(self.browser, 10, poll_frequency=0.05).until(lambda _: condition())

    def type(self, prompt):
        self.all("#prompt")[0].send_keys(prompt, Keys.ENTER)
        self.wait(lambda: self.all("#text[aria-busy=false]"))

    def press(self, number):
        next(button for button in self.all("#text button") if button.text == number).click()

    def set(self, field, value):
        self.browser.execute_script(
            "document.getElementById(arguments[0]).value = arguments[1]", field, value
        )


@pytest.fixture
def page(browser, url):
    return Page(browser, url)


def test_type_an_expression_read_the_answer_open_its_dag(page, url):
    page.type("12+34=")
    assert page.text("#text") == "12+34=46"
    page.press("46")
    assert page.text("#panel h2") == "12 + 34 = 46"
    assert [node.text for node in page.all(".graph .value")] == ["12", "34", "46"]
    assert [node.text for node in page.all(".graph .sign")] == ["+"]
    thought = ask(url, "12+34=").json()["thoughts"][-1]
    used = {slot for step in thought["steps"] for slot in step["operands"]}
    operands = [number for number in thought["inputs"] if number["slot"] in used]
    expected = {(str(i), str(n["slot"])) for n in operands for i in range(n["first"], n["last"] + 1)}
    marked = page.all("[data-operand]")
    assert {(t.get_attribute("data-token"), t.get_attribute("data-operand")) for t in marked} == expected
    assert len(expected) == 4
    weighed = [row.text for row in page.all(".plans li span:first-child")]
    assert weighed == [p["expression"].replace("-", "\u2212") for p in (thought, *thought["alternatives"])]
    assert page.browser.get_log("browser") == []  # no error, no breach of the content security policy


def test_the_gate_runs_along_the_sentence(page, url):
    page.type("12+34=")
    read = "return [...document.querySelectorAll('.token')].map((token) => token.style.getPropertyValue('--gate'))"
    assert [float(gate) for gate in page.browser.execute_script(read)] == pytest.approx(
        [token["gate"] or 0 for token in ask(url, "12+34=").json()["tokens"]]
    )


def test_everything_is_reached_by_keyboard(page):
    page.type("98-35=")

    def focused():
        return page.browser.switch_to.active_element

    for _ in range(20):
        if focused().text == "63":
            break
        focused().send_keys(Keys.TAB)
    focused().send_keys(Keys.ENTER)
    assert focused().get_attribute("aria-expanded") == "true"
    assert page.text("#panel h2") == "98 \u2212 35 = 63"
    focused().send_keys(Keys.ESCAPE)
    assert focused().get_attribute("aria-expanded") == "false"
    assert page.all("[data-operand]") == [] and not page.all("#panel")[0].is_displayed()


def test_one_number_is_open_at_a_time_and_a_new_text_closes_it(page):
    page.type("12+34=")
    page.press("46")
    page.press("12")
    assert "You wrote this number. Nothing was planned: no number before it." in page.text("#panel")
    assert [button.text for button in page.all("[aria-expanded=true]")] == ["12"]
    assert page.all("[data-operand]") == []
    page.press("46")
    page.type(Keys.BACKSPACE)  # 12+34
    assert page.all("[data-operand]") == [] and not page.all("#panel")[0].is_displayed()


MARKUP = [
    "<img src=x onerror=alert(1)>1+1=",
    "<script>alert(1)</script>2",
    "&lt;b&gt;<b>3</b>",
    "</p><style>*{}4",
]


@pytest.mark.parametrize("prompt", MARKUP)
def test_nothing_typed_becomes_html(page, prompt):
    elements = (
        "return [...new Set([...document.querySelectorAll('#text *, #problem *')].map(n => n.tagName))]"
    )
    page.type(prompt)
    assert page.text("#text").startswith(prompt)
    assert set(page.browser.execute_script(elements)) <= {"SPAN", "BUTTON"}
    page.all("#text button")[0].click()
    assert page.all("img, style, b, script:not([src])") == []
    assert page.browser.get_log("browser") == []


def test_the_browser_itself_refuses_html_from_strings(page):
    attempt = "try { document.body.innerHTML = '<b>1</b>' } catch (error) { return error.name }"
    assert page.browser.execute_script(attempt) == "TypeError"
    inline = (
        "const s = document.createElement('script'); s.append('window.broken = 1'); document.body.append(s)"
    )
    page.browser.execute_script(f"try {{ {inline} }} catch (error) {{}}")
    assert page.browser.execute_script("return window.broken") is None


def test_a_phone_shows_it_without_sideways_scrolling(page):
    screen = dict(width=375, height=700, deviceScaleFactor=1, mobile=True)
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        page.type(f"{'1' * 20}+{'2' * 20}=")
        page.all("#text .computed")[-1].click()
        for summary in page.all("summary"):
            summary.click()
        assert page.browser.execute_script("return document.documentElement.scrollWidth") == 375
        scroll = (
            "const graph = document.querySelector('.graph'); graph.scrollLeft = 9; return graph.scrollLeft"
        )
        assert page.browser.execute_script(scroll) == 9
        page.all("#prompt")[0].clear()
        page.type("7" * 60)
        right = "Math.max(...[...document.querySelectorAll('.token')].map((t) => t.getBoundingClientRect().right))"
        edge = "document.querySelector('#text').getBoundingClientRect().right"
        assert page.browser.execute_script(f"return {right} - {edge}") <= 1
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_mistakes_are_said_on_the_page(page):
    page.type("1" * 65)
    assert page.text("#problem") == "a prompt of 65 tokens does not fit the context: shorten it to 64"
    assert not page.all("#result")[0].is_displayed()
    page.all("#prompt")[0].clear()
    page.type("12+34=")
    assert (page.text("#problem"), page.text("#text")) == ("", "12+34=46")


def test_shift_and_enter_begin_a_line(page):
    page.all("#prompt")[0].send_keys("12", Keys.SHIFT, Keys.ENTER)
    page.all("#prompt")[0].send_keys(Keys.SHIFT)
    assert page.all("#prompt")[0].get_property("value") == "12\n"
    assert not page.all("#result")[0].is_displayed()


def test_examples_and_settings(page):
    page.set("length", 1)
    page.all("#examples button")[0].click()
    page.wait(lambda: page.all("#text .token"))
    assert page.text("#text") == "12+34=4"
    page.set("length", "")
    page.type("")
    assert page.text("#text") == "12+34=46"  # an empty field leaves it to the server


BYTE_BY_BYTE = """
const whole = window.fetch;
window.fetch = async (...request) => {
  const bytes = new Uint8Array(await (await whole(...request)).arrayBuffer());
  const pull = (stream) => bytes.forEach((byte) => stream.enqueue(Uint8Array.of(byte))) ?? stream.close();
  return new Response(new ReadableStream({ start: pull }));
};
"""


def test_a_stream_may_come_in_any_pieces(page):
    page.browser.execute_script(BYTE_BY_BYTE)
    page.type("12+34=")
    assert (page.text("#text"), page.text("#problem")) == ("12+34=46", "")
    assert page.all("#text .computed")


def test_a_new_text_ends_the_one_before(browser):
    with serving(documents=False, max_new_tokens=10**6, at_once=1) as address:
        page = Page(browser, address)
        page.set("length", 10**6)
        page.all("#prompt")[0].send_keys("1+", Keys.ENTER)
        page.wait(lambda: len(page.text("#text")) > 20)
        page.set("prompt", "")
        page.set("length", 1)
        page.type("12+34=")
        assert page.text("#text") == "12+34=4"


def test_the_page_says_what_model_it_is(page):
    page.all("#about summary")[0].click()
    assert "here, step 0" in page.all("#about")[0].text and "sums" in page.all("#about")[0].text


@pytest.mark.parametrize("plans, gate", [(True, True), (False, True), (False, False)])
def test_of_gates_and_plans_is_spoken_where_the_model_has_them(browser, monkeypatch, plans, gate):
    monkeypatch.setitem(ABOUT, "plans", plans)
    monkeypatch.setitem(ABOUT, "gate", gate)
    with serving() as address:
        page = Page(browser, address)
        page.type("12+34=")
    page.all("#about summary")[0].click()
    shown = page.all("body")[0].text
    assert [words in shown for words in ("gate shut", "Press a number", "plan a short")] == [
        gate,
        plans,
        plans,
    ]
    assert ("gate" in page.all(".token")[-1].get_attribute("title")) == gate
    styles = [token.get_attribute("style") for token in page.all(".token")]
    assert (styles[-1] == styles[0]) == (not gate)


def test_a_server_that_is_gone_is_said(browser):
    with serving() as address:
        page = Page(browser, address)
    page.type("12+34=")
    assert page.text("#problem") == "The server does not answer: is serve.py still running?"
