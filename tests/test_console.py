"""The console in a real Chromium, against a real service: what an operator sees and does."""

import functools
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import axe_core_python
import pytest

from tests.browser import HAS_BROWSER, Browser, WebDriverError
from tests.stack import Stack, until

AXE = pathlib.Path(axe_core_python.__file__).with_name("axe.min.js").read_text()
REASONS = {"KeyError: 'price'": 400, "HTTP 502 from the shop": 200, "no stock": 100}
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


def test_the_tests_have_a_browser() -> None:
    assert HAS_BROWSER, "expected chromium and chromedriver: run.sh test installs them on Debian"


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A browser, in whose console no error may be in the end."""
    with Browser() as browser:
        yield browser
        complaints = [each["message"] for each in browser.console() if each["level"] == "SEVERE"]
        assert complaints == []


def expect_complaints(browser: Browser, *texts: str) -> None:
    """Read the browser's console: Chromium itself notes each failed call there, and nothing else
    may be there."""
    complaints = [each["message"] for each in browser.console() if each["level"] == "SEVERE"]
    assert complaints and all(any(text in each for text in texts) for each in complaints)


def violations(browser: Browser) -> list[str]:
    """Return what axe-core finds wrong with the page as it is."""
    browser.script(AXE)
    found = browser.script("return axe.run()")["violations"]
    return [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]


def shows(browser: Browser, css: str, text: str) -> bool:
    """Tell whether an element shows a text now; the page may redraw it meanwhile."""
    try:
        return any(text in element.text for element in browser.find_all(css))
    except WebDriverError:
        return False


def wait_text(browser: Browser, css: str, text: str, timeout: float = 30) -> None:
    """Wait until an element shows a text."""
    until(lambda: shows(browser, css, text), timeout, f"{css} shows {text}")


def rows(browser: Browser) -> list[str]:
    """Return the ids of the tasks in the list."""
    script = "return [...document.querySelectorAll('#tasks tbody tr')].map((row) => row.dataset.id)"
    return browser.script(script)


def new_page(browser: Browser, seen: list[str], size: int) -> list[str]:
    """Return the ids of the tasks shown if they are so many, and none of those seen before."""
    shown = rows(browser)
    return shown if len(shown) == size and not set(shown) & set(seen) else []


def go_to_task(browser: Browser, stack: Stack, task_id: str) -> None:
    """Open a task's page."""
    browser.go(f"{stack.url}/#/task/{task_id}")
    wait_text(browser, "#task-id", task_id)


def insert_failed(stack: Stack, reasons: dict[str, int]) -> None:
    """Put failed tasks into the table, with some of the work done a while ago."""
    for reason, count in reasons.items():
        stack.sql(
            "INSERT INTO tasks (text, status, error, attempt, failures, sent_at, started_at, "
            " finished_at, seconds, host)"
            " SELECT 'order ' || number, 'error', %s, 1, 1, now() - interval '5 minutes',"
            " now() - interval '4 minutes', now() - interval '3 minutes', 0.25, 'shop-1'"
            " FROM generate_series(1, %s) AS number",
            reason, count,
        )  # fmt: skip


def insert_done(stack: Stack, count: int) -> None:
    """Put successful tasks into the table."""
    stack.sql(
        "INSERT INTO tasks (text, status, sent_at, started_at, finished_at, seconds)"
        " SELECT 'order', 'success', now(), now(), now() - number * interval '1 second', 0.1"
        " FROM generate_series(1, %s) AS number",
        count,
    )


def test_an_operator_finds_what_fails_and_what_hangs_and_sets_it_right(
    stack: Stack, browser: Browser
) -> None:
    """10,000 tasks: 700 failed for three reasons, and two hang."""
    stack.producer()
    insert_done(stack, 9298)
    insert_failed(stack, REASONS)
    stack.consumer(HANDLER="handlers:nap", CONCURRENCY=3)
    hanging = stack.create("3600", "3600")
    browser.go(stack.url)
    # What fails, and why: the reasons by number.
    browser.wait(lambda: len(browser.find_all("[data-reason]")) == 3)
    for reason, count in REASONS.items():
        wait_text(browser, "main", reason)
        wait_text(browser, "main", str(count))
    # What hangs, and where: the longest runs; one click to the task, one to its consumer.
    browser.wait(lambda: len(browser.find_all("#longest tbody tr")) == 2, timeout=30)
    browser.click("#longest tbody tr a")
    wait_text(browser, "main", "runs for")
    stuck = browser.text("#task-id")
    assert stuck in hanging
    browser.click("#cancel")
    browser.click("#confirm-ok")
    wait_text(browser, ".badge", "Error")
    stack.wait_status([stuck], "error")
    # Click on the reason, retry all of it: two clicks more, and the count is confirmed first.
    browser.go(f"{stack.url}/#/")
    browser.click("[data-reason]")
    browser.wait(lambda: len(rows(browser)) == 50)
    assert "error=KeyError" in browser.url
    browser.click("#retry-all")
    wait_text(browser, "#confirm-ok", "400")
    browser.click("#confirm-ok")
    wait_text(browser, "#notice", "400 of 400 changed")
    [(left,)] = stack.sql("SELECT count(*) FROM tasks WHERE status = 'error'")
    assert left >= 301  # the retried ones fail again, for another reason: no number
    [(retried,)] = stack.sql("SELECT count(*) FROM tasks WHERE attempt = 2")
    assert retried >= 400
    # The rest by hand: one page, selected.
    browser.go(f"{stack.url}/#/tasks?status=error&error=no%20stock")
    browser.wait(lambda: len(rows(browser)) == 50)
    selected = rows(browser)
    browser.click("#select-page")
    browser.click("#retry-selected")
    wait_text(browser, "#notice", "50 of 50 changed")
    attempts = stack.sql("SELECT DISTINCT attempt FROM tasks WHERE id = ANY(%s::uuid[])", selected)
    assert attempts == [(2,)]


def test_a_task_is_created_and_followed_to_its_success(stack: Stack, browser: Browser) -> None:
    stack.producer()
    stack.consumer(PROCESSING_SECONDS=1)
    browser.go(stack.url)
    wait_text(browser, "#health", "All is well", 60)
    browser.click("#create")
    browser.click("#new-create")
    wait_text(browser, "#new-error", "text: expected at least one character")
    browser.type("#new-text", "hello Привет")
    browser.type("#new-timeout", "30")
    browser.click("#new-create")
    wait_text(browser, ".badge", "Success")
    wait_text(browser, "pre#text", "hello Привет")
    for step in ("Created", "Sent", "Started", "Finished"):
        wait_text(browser, ".timeline", step)
    assert stack.counts() == {"success": 1}
    browser.click("#run-again")
    browser.click("#confirm-ok")
    wait_text(browser, "#history", "retried")
    expect_complaints(browser, "400")


def test_pages_follow_each_other_and_the_address_is_the_state(
    stack: Stack, browser: Browser
) -> None:
    stack.producer()
    insert_failed(stack, {"boom": 120})
    browser.go(f"{stack.url}/#/tasks?status=error")
    seen: list[str] = []
    for size in (50, 50, 20):
        last = browser.wait(functools.partial(new_page, browser, list(seen), size))
        seen += last
        if size == 50:
            browser.click("#next")
    assert len(set(seen)) == 120
    browser.reload()
    browser.wait(lambda: rows(browser) == seen[100:])
    browser.back()
    browser.wait(lambda: rows(browser) == seen[50:100])
    browser.go(f"{stack.url}/#/tasks?status=error")
    browser.type("#filter-error", "nothing")
    browser.click("#apply")
    wait_text(browser, "#empty", "No task matches")


def test_a_pause_is_seen_on_every_page_and_ended_with_a_click(
    stack: Stack, browser: Browser
) -> None:
    stack.producer()
    stack.consumer()
    browser.go(stack.url)
    browser.click("#pause")
    browser.click("#confirm-ok")
    wait_text(browser, "#paused", "Dispatch is paused")
    [task_id] = stack.create("x")
    go_to_task(browser, stack, task_id)
    wait_text(browser, "#paused", "Dispatch is paused")
    wait_text(browser, ".badge", "Pending")
    browser.click("#resume")
    wait_text(browser, ".badge", "Success")
    browser.wait(lambda: not browser.find_all("#paused"))


def test_a_cancelled_selection_is_cancelled_and_nothing_else(
    stack: Stack, browser: Browser
) -> None:
    stack.producer()
    stack.sql("INSERT INTO pause DEFAULT VALUES")
    stack.create(*(f"number {number}" for number in range(5)))
    browser.go(f"{stack.url}/#/tasks?status=pending")
    browser.wait(lambda: len(rows(browser)) == 5)
    chosen = rows(browser)[:2]
    for task_id in chosen:
        browser.click(f'tr[data-id="{task_id}"] input')
    stack.create("one more, that must not move the list")
    time.sleep(3)  # longer than a refresh
    assert len(rows(browser)) == 5
    browser.click("#cancel-selected")
    browser.click("#confirm-ok")
    wait_text(browser, "#notice", "2 of 2 changed")
    cancelled = stack.sql("SELECT id FROM tasks WHERE status = 'error'")
    assert sorted(each for (each,) in cancelled) == sorted(chosen)


def test_hostile_texts_are_shown_and_not_run(stack: Stack, browser: Browser) -> None:
    stack.producer()
    [task_id] = stack.create(HOSTILE)
    stack.put(taskId=task_id, taskStatus="error", error=HOSTILE)
    browser.go(stack.url)
    wait_text(browser, "main", "<img src=x onerror=")
    browser.click("[data-reason]")
    wait_text(browser, "#tasks", "<img src=x onerror=")
    go_to_task(browser, stack, task_id)
    wait_text(browser, "pre#text", HOSTILE)
    assert browser.script("return document.querySelectorAll('main img, main script').length") == 0
    assert "hacked" not in browser.script("return document.title")


def test_without_a_token_nothing_is_shown_and_with_that_for_reading_nothing_is_done(
    stack: Stack, browser: Browser
) -> None:
    stack.producer(API_TOKEN="all", READ_TOKEN="some")
    browser.go(stack.url)
    browser.type("#token", "wrong")
    browser.keys("Enter")
    wait_text(browser, "main", "did not accept this token")
    browser.type("#token", "some")
    browser.keys("Enter")
    wait_text(browser, "#header", "Read-only")
    assert not browser.find_all("#create") and not browser.find_all("#pause")
    browser.reload()  # the token is kept while the tab is open
    wait_text(browser, "#header", "Read-only")
    browser.click("#forget-token")
    browser.type("#token", "all")
    browser.keys("Enter")
    browser.find("#create")
    assert not shows(browser, "#header", "Read-only")
    expect_complaints(browser, "401")


def test_a_producer_that_goes_away_is_missed_and_welcomed_back(
    stack: Stack, browser: Browser
) -> None:
    producer = stack.producer()
    stack.consumer()
    browser.go(stack.url)
    wait_text(browser, "#health", "All is well", 60)
    producer.kill()
    wait_text(browser, "#away", "The producer does not answer")
    wait_text(browser, "#health", "The producer does not answer")
    wait_text(browser, "main", "Workers busy")  # what is known is still shown
    stack.producer()
    browser.wait(lambda: not browser.find_all("#away"), timeout=60)
    wait_text(browser, "#health", "All is well", 60)
    expect_complaints(browser, "ERR_")


def test_the_keyboard_is_enough(stack: Stack, browser: Browser) -> None:
    stack.producer()
    [task_id] = stack.create("x")
    browser.go(stack.url)
    browser.find("#create")
    browser.keys("/")
    browser.keys(*task_id, "Enter")
    wait_text(browser, "#task-id", task_id)
    assert browser.script("return document.activeElement.tagName") == "H1"

    def press_until(what: str) -> None:
        for _ in range(40):
            browser.keys("Tab")
            if browser.script("return document.activeElement.matches(arguments[0])", what):
                return
        raise AssertionError(f"Tab does not reach {what}")

    press_until("#cancel")
    browser.keys("Enter")
    browser.find("#confirm[open]")
    browser.keys("Escape")
    browser.wait(lambda: not browser.find_all("#confirm[open]"))
    press_until("#cancel")
    browser.keys("Enter", "Enter")  # the dialog's OK has the focus
    wait_text(browser, ".badge", "Error")
    browser.keys("n")
    browser.find("#new-task[open]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_breaks_a_rule_of_accessibility_or_is_wider_than_a_phone(
    stack: Stack, browser: Browser, scheme: str
) -> None:
    stack.producer()
    insert_failed(stack, {**REASONS, HOSTILE: 3, "x" * 300: 3})
    insert_done(stack, 100)
    stack.consumer(HANDLER="handlers:nap")
    [task_id] = stack.create("600")
    [(failed,)] = stack.sql("SELECT id FROM tasks WHERE error = 'no stock' LIMIT 1")
    stack.put(taskId=failed, taskStatus="pending")
    stack.put(taskId=failed, taskStatus="error")
    browser.media(prefers_color_scheme=scheme)
    ground = {"light": "rgb(245, 246, 248)", "dark": "rgb(15, 18, 23)"}
    lists = [f"#/tasks?status={name}" for name in ("pending", "sent", "success", "error")]
    for page in ("#/", *lists, f"#/task/{task_id}", f"#/task/{failed}", "#/consumers"):
        for width in (1280, 360):
            browser.size(width, 800)
            browser.go(f"{stack.url}/{page}")
            browser.wait("main h1")
            browser.wait(lambda: not shows(browser, "main", "Loading"))
            assert violations(browser) == [], page
            wide = "return document.documentElement.scrollWidth"
            assert browser.script(wide) <= width, page
    color = browser.script("return getComputedStyle(document.body).backgroundColor")
    assert color == ground[scheme]


def test_it_speaks_russian_to_who_reads_russian(stack: Stack) -> None:
    stack.producer()
    with Browser("ru-RU") as browser:
        browser.go(stack.url)
        for text in ("Обзор", "Ожидает обработки", "Успешно", "Ошибка"):
            wait_text(browser, "#tabs", text)
        assert browser.script("return document.documentElement.lang") == "ru"
        browser.click("#language")
        wait_text(browser, "#tabs", "Overview")


def test_every_word_is_there_in_both_languages() -> None:
    page = (pathlib.Path(__file__).parents[1] / "console.html").read_text()
    block = re.search(r"const WORDS = readWords\(`(.*?)`\);", page, re.DOTALL)
    assert block is not None
    words: dict[str, Any] = {}
    for entry in re.split(r"\n(?=\S)", block[1].strip()):
        key, *both = " ".join(entry.split()).split(" | ")
        assert len(both) == 2 and all(both), entry
        assert set(re.findall(r"\{\w+\}", both[0])) == set(re.findall(r"\{\w+\}", both[1])), key
        words[key] = both
    assert len(words) > 100 and len(page.encode()) < 60_000
