"""The chat page works in a real browser: it streams answers, and shows who gave them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from headrace import errors
from tests.deploy import tools
from tests.gateway.fake_router import Edge, edge
from tests.harness import eventually


@pytest.fixture(scope="module")
async def browser() -> AsyncGenerator[Browser, None]:
    program = tools.need("chromium-headless-shell")
    async with async_playwright() as playwright:
        # As root, Chromium's own sandbox does not start.
        started = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        await started.close()


@pytest.fixture(scope="module")
async def running() -> AsyncGenerator[Edge, None]:
    async with edge() as started:
        yield started


@pytest.fixture
async def opened(browser: Browser, running: Edge) -> AsyncGenerator[tuple[Page, Edge], None]:
    """The page, in front of a router that answers as usual; nothing may fail on its console."""
    running.router.reset()
    page = await browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    await page.goto(address_of(running))
    yield page, running
    await page.close()
    # A refused request is on the console as well.
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []


def address_of(running: Edge) -> str:
    return running.url.rstrip("/").removesuffix("v1")


async def ask(page: Page, text: str) -> None:
    await page.get_by_label("Message").fill(text)
    await page.get_by_label("Message").press("Enter")


async def test_an_answer_is_shown_while_it_is_streamed_with_its_tier_score_and_cost(
    opened: tuple[Page, Edge],
) -> None:
    page, running = opened
    running.router.gate = asyncio.Event()

    await ask(page, "Hi there")
    answer = page.locator("li.assistant")
    await expect(answer.locator(".text")).to_have_text("Hello")
    await expect(answer.locator(".facts")).to_contain_text("tier small · tiny · score 0.25")
    running.router.gate.set()

    await expect(answer.locator(".text")).to_have_text("Hello 🚀")
    await expect(answer.locator(".facts")).to_contain_text("cost 0.5")
    await expect(answer.locator(".facts")).to_contain_text("5 tokens · stop")
    await expect(page.locator("li.user .text")).to_have_text("Hi there")


async def test_a_conversation_is_sent_as_a_whole_until_a_new_one_begins(opened: tuple[Page, Edge]) -> None:
    page, running = opened
    asked = running.router.requests
    done = page.get_by_text("5 tokens · stop")

    await ask(page, "One")
    await expect(done).to_have_count(1)
    await ask(page, "Two")
    await expect(done).to_have_count(2)
    await page.get_by_role("button", name="New conversation").click()
    await ask(page, "Three")
    await expect(done).to_have_count(1)

    assert [[turn.content for turn in request.chat.messages] for request in asked] == [
        ["One"],
        ["One", "Hello 🚀\n", "Two"],
        ["Three"],
    ]
    first, second, third = (request.routing.session_id for request in asked)
    assert first == second != third


async def test_the_chosen_model_answers(opened: tuple[Page, Edge]) -> None:
    page, running = opened

    await page.get_by_label("Model").select_option("large")
    await ask(page, "Hi")

    await expect(page.locator("li.assistant .facts")).to_contain_text("tier large")
    assert running.router.requests[-1].routing.tier == "large"


async def test_stop_cancels_the_request(opened: tuple[Page, Edge]) -> None:
    page, running = opened
    running.router.gate = asyncio.Event()

    await ask(page, "Hi")
    await expect(page.locator("li.assistant .text")).to_have_text("Hello")
    await page.get_by_role("button", name="Stop").click()

    await expect(page.locator("li.assistant .facts")).to_contain_text("stopped")
    await eventually(lambda: running.router.active == 0)
    await expect(page.get_by_role("button", name="Send")).to_be_visible()


async def test_an_error_is_shown_and_the_question_can_be_sent_again(opened: tuple[Page, Edge]) -> None:
    page, running = opened
    running.router.refuses = errors.Overloaded("the queue is full", retry_after=1.0)

    await ask(page, "Hi")
    await expect(page.get_by_role("alert")).to_contain_text("the queue is full")
    running.router.refuses = None
    await ask(page, "Hi")

    await expect(page.get_by_text("5 tokens · stop")).to_have_count(1)
    assert [turn.content for turn in running.router.requests[-1].chat.messages] == ["Hi"]


async def test_markup_in_an_answer_stays_text(opened: tuple[Page, Edge]) -> None:
    page, running = opened
    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    running.router.tokens = (markup.encode(),)

    await ask(page, "Hi")

    await expect(page.locator("li.assistant .text")).to_have_text(markup)
    assert await page.locator("li.assistant img, li.assistant b").count() == 0


async def test_the_policy_forbids_scripts_that_are_not_the_page_s_own(
    browser: Browser, running: Edge
) -> None:
    page = await browser.new_page()
    await page.goto(address_of(running))

    blocked = await page.evaluate(
        """() => new Promise((resolve) => {
            const tell = (event) => resolve(event.effectiveDirective);
            document.addEventListener("securitypolicyviolation", tell);
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
        })"""
    )

    assert blocked.startswith("script-src")
    assert await page.evaluate("window.ran") is None
    await page.close()
