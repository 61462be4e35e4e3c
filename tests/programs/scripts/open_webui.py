"""Open WebUI in Chromium: the first chat at default settings, as a single user without a login."""

import subprocess
from importlib.metadata import version
from pathlib import Path

from checks import MODEL, URL, check, free_port, metric, running, tell, wait_for
from playwright.sync_api import sync_playwright

tell(version=version("open-webui"))
port = free_port()
settings = {
    "DATA_DIR": str(Path.cwd() / "data"),
    "ENABLE_OLLAMA_API": "False",
    "OFFLINE_MODE": "True",
    "OPENAI_API_BASE_URL": f"{URL}/v1",
    "OPENAI_API_KEY": "sk-none",
    "WEBUI_AUTH": "False",
}
chromium = subprocess.check_output(["which", "chromium"], text=True).strip()
MINUTES = 180_000  # milliseconds


def answered():
    """Requests for chats that were answered in full."""
    return metric("banded_requests_total", 'outcome="stop"') + metric("banded_requests_total", 'outcome="length"')


with (
    running(["open-webui", "serve", "--host", "127.0.0.1", "--port", str(port)], port, **settings),
    sync_playwright() as playwright,
    playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
):
    page = browser.new_page()
    page.set_default_timeout(MINUTES)
    news = page.get_by_role("button", name="Okay, Let's Go!")
    page.add_locator_handler(news, lambda: news.click())

    @check("the model is listed and chosen")
    def _():
        page.goto(f"http://127.0.0.1:{port}/", wait_until="domcontentloaded")
        page.locator("#chat-input").wait_for()
        page.get_by_role("button", name=MODEL).first.wait_for()
        page.screenshot(path="start.png")

    @check("a chat at default settings, with all its tools, is answered in the page")
    def _():
        page.locator("#chat-input").click()
        page.keyboard.type("Tell me a tale.")
        page.keyboard.press("Enter")
        content = page.locator(".chat-assistant #response-content-container")
        content.wait_for()
        page.locator("#response-message-model-name").wait_for()
        wait_for(content.inner_text, "something to read")
        wait_for(answered, f"a whole answer; the page shows {content.inner_text()!r}", 240)
        page.screenshot(path="chat.png")
        assert content.inner_text().strip(), "the page shows nothing"

    @check("its tasks are answered: title, tags, follow-ups")
    def _():
        wait_for(lambda: answered() >= 4, "the chat and three tasks are answered", 240)
        page.screenshot(path="tasks.png")
