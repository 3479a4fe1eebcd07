"""The page in Chromium, against a whole stack: what a person sees and does there."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.conftest import HOSTILE, Site
from tests.support.batches import line, lines
from tests.support.waiting import until
from vllm_batch.v1 import recovery_service_pb2 as rpb

expect.set_options(timeout=30_000)

# Rules of WCAG 2.1, A and AA, and what axe recommends beside.
AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}

DROP = """([name, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name, { type: "application/jsonl" }));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
}"""


def sign_in(page: Page, site: Site, name: str = "olga", view: str = "") -> None:
    page.goto(site.url + view)
    page.get_by_label("Token").fill(site.secrets[name])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()


def drop(page: Page, name: str, content: bytes) -> str:
    """Drops a file onto the page. Returns the id of the batch that it then shows."""
    page.evaluate(DROP, [name, content.decode()])
    page.wait_for_url(re.compile(r"#/batches/batch_\d+$"))
    return page.url.rpartition("/")[2]


# Changes a chosen file before it is read again, which is when it is sent.
CHANGE = """const send = XMLHttpRequest.prototype.send;
XMLHttpRequest.prototype.send = async function (body) {
  await window.change();
  send.call(this, body);
};"""


def check_accessible(page: Page) -> None:
    found = Axe().run(page, options=AXE)
    assert found.violations_count == 0, found.generate_report()


@pytest.fixture
def ended(site: Site) -> Iterator[str]:
    """A batch that has ended, with a failed request, hostile names and a hostile result."""
    with site.client() as client:
        content = [line("good"), line(HOSTILE), line("refused", vllm_xargs={"simulate": "refuse"})]
        batch = client.submit_lines(content, metadata={"note": HOSTILE})
        list(client.watch(batch.id))
        number = batch.id.removeprefix("batch_")
        body = '{"choices": [{"message": {"content": "<b>bold</b><script>window.hurt=1</script>"}}]}'
        site.stack.sql(f"UPDATE results SET body = '{body}' WHERE batch_id = {number} AND index = 0")
        yield batch.id
        client.delete(batch.id)


def test_signing_in_and_out(page: Page, site: Site) -> None:
    """A wrong token opens nothing, a right one a session that scripts cannot read and that ends by signing out."""
    page.goto(site.url)
    page.get_by_label("Token").fill("vbt_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert").filter(has_text="not known")).to_be_visible()
    check_accessible(page)
    sign_in(page, site)
    expect(page.get_by_role("heading", name="Batches")).to_be_visible()
    [cookie] = page.context.cookies(site.url + "page/")
    assert (cookie.get("httpOnly"), cookie.get("sameSite"), cookie.get("path")) == (True, "Strict", "/page/")
    assert page.evaluate("document.cookie") == ""
    assert site.secrets["olga"] not in str(cookie)
    page.reload()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    # The cookie is worth nothing any more.
    answer = httpx.get(f"{site.url}page/api/session", headers={"cookie": f"{cookie['name']}={cookie['value']}"})
    assert answer.status_code == 401


def test_submitted_by_drag_and_watched_through_a_kill(page: Page, site: Site) -> None:
    """A file that is dropped becomes a batch whose bar moves on, through the death of its worker, to its end."""
    sign_in(page, site)
    drop(page, "prompts.jsonl", b"".join(lines(1000)))
    expect(page.locator(".facts")).to_contain_text("prompts.jsonl")
    done = page.locator(".head-line")
    expect(done).to_have_text(re.compile(r"[1-9]\d* of 1,000 requests"))
    os.kill(site.stack.pid("worker"), signal.SIGKILL)
    expect(page.locator(".head .badge")).to_have_text("waiting")
    expect(page.get_by_label("Why it waits")).to_contain_text("worker")
    expect(page.locator(".head .badge")).to_have_text("completed", timeout=60_000)
    expect(done).to_contain_text("100 % 1,000 of 1,000 requests")
    page.get_by_role("link", name="Workers").click()
    restart = page.locator(".events .row").filter(has_text="restart").first
    expect(restart).to_contain_text("recovered")
    expect(restart).to_contain_text("load")
    restart.locator("summary").click()
    expect(restart.locator("pre")).to_contain_text("process")
    expect(page.get_by_label(re.compile("^Health over the last 15 minutes; now serving"))).to_be_visible()
    check_accessible(page)


def test_wrong_lines_are_shown_at_their_lines(page: Page, site: Site) -> None:
    """A file with wrong lines shows each with its number, its text and what is wrong with it."""
    sign_in(page, site)
    drop(page, f"{HOSTILE}.jsonl", line("a") + b"no json\n" + line("a") + line("c"))
    wrong = page.locator(".source li")
    expect(wrong).to_have_count(2)
    expect(wrong.nth(0)).to_contain_text(re.compile("2.*no json.*invalid_json_line"))
    expect(wrong.nth(1)).to_contain_text(re.compile("3.*hello a.*duplicate_custom_id"))
    check_accessible(page)
    assert not page.evaluate("window.hurt")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("appended to", "The file was changed or moved after it was chosen."),
        ("removed", "The file was changed or moved after it was chosen."),
        ("none", "The connection broke off."),
    ],
)
def test_a_file_that_changes_is_told_from_a_connection_that_breaks(
    change: str, told: str, page: Page, site: Site, tmp_path: Path
) -> None:
    """An upload that ends because its file is another by now says so, and not that the connection broke off."""
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"".join(lines(1000)))

    def changed() -> None:
        if change == "removed":
            file.unlink()
        elif change == "appended to":
            file.write_bytes(file.read_bytes() + line("another"))
            os.utime(file, (0, 0))

    page.expose_function("change", changed)
    page.add_init_script(CHANGE)
    if change == "none":
        page.route("**/page/api/v1/files", lambda route: route.abort())
    sign_in(page, site)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Submit").first.click()
    chooser.value.set_files(file)
    expect(page.get_by_role("dialog").get_by_role("alert")).to_have_text(told)


def test_a_folder_is_not_a_file_that_changed(page: Page, site: Site, tmp_path: Path) -> None:
    """A folder that is dropped is refused as a folder."""
    sign_in(page, site)
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(tmp_path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})
    expect(page.get_by_text("A folder cannot be submitted: drop a file.")).to_be_visible()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_results_are_text(page: Page, site: Site, ended: str) -> None:
    """Markup in names, metadata and results is shown as it is, and never becomes part of the page."""
    sign_in(page, site, view=f"#/batches/{ended}")
    results = page.locator(".results .row")
    expect(results).to_have_count(3)
    expect(results.nth(0)).to_contain_text("<b>bold</b><script>window.hurt=1</script>")
    expect(results.nth(1)).to_contain_text(HOSTILE)
    expect(page.locator(".facts")).to_contain_text(HOSTILE)
    results.nth(1).get_by_role("button").click()
    expect(page.get_by_role("dialog").get_by_role("heading", name=HOSTILE)).to_be_visible()
    expect(page.get_by_role("dialog").get_by_label("Request")).to_contain_text("hello")
    expect(page.get_by_role("dialog").get_by_label("Result")).to_contain_text("choices")
    check_accessible(page)
    page.keyboard.press("Escape")
    assert page.locator("main img, main script, main b").count() == 0
    assert not page.evaluate("window.hurt")


def test_an_error_is_read(page: Page, site: Site, ended: str) -> None:
    """Errors are counted by kind, and lead to a request beside its result; results are downloaded as they are."""
    sign_in(page, site, view=f"#/batches/{ended}")
    kind = page.locator(".kinds .row")
    expect(kind).to_contain_text("refused on request")
    kind.get_by_role("button", name="Example").click()
    expect(page.get_by_role("dialog").get_by_label("Request")).to_contain_text("simulate")
    expect(page.get_by_role("dialog").get_by_label("Result")).to_contain_text("BadRequestError")
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Failed", exact=True).click()
    expect(page.locator(".results .row")).to_have_count(1)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download failed").click()
    text = download.value.path().read_text()
    assert text.count("\n") == 1
    assert '"custom_id": "refused"' in text


def test_cancelled_retried_and_deleted_by_keyboard(page: Page, site: Site) -> None:
    """Without a mouse: a batch is cancelled, its rest is submitted again, and it is deleted."""
    sign_in(page, site)
    batch = drop(page, "long.jsonl", b"".join(lines(2000)))
    expect(page.locator(".head-line")).to_contain_text("of 2,000 requests")

    def press(name: str) -> None:
        page.get_by_role("button", name=name, exact=True).focus()
        page.keyboard.press("Enter")

    press("Cancel")
    check_accessible(page)
    press("Cancel the batch")
    expect(page.locator(".head .badge")).to_have_text("cancelled")
    press("Retry failed")
    page.wait_for_url(lambda url: batch not in url)
    expect(page.locator(".head-line")).to_contain_text("requests")
    press("Cancel")
    press("Cancel the batch")
    expect(page.locator(".head .badge")).to_have_text("cancelled")
    press("Delete")
    press("Delete the batch")
    expect(page.get_by_role("heading", name="Batches")).to_be_visible()


def test_recovery_is_paused_and_resumed(page: Page, site: Site) -> None:
    """An order that is left on the page reaches the watchdog, with who gave it, and is shown as it stands."""
    sign_in(page, site, view="#/workers")
    worker = page.get_by_role("article").filter(has=page.get_by_role("heading", name="worker", exact=True))
    worker.get_by_role("button", name="Pause recovery").click()
    page.get_by_label("Reason").fill("new cable")
    page.get_by_role("button", name="Pause", exact=True).click()
    expect(worker).to_contain_text("new cable (olga, on the page)")
    until(lambda: site.stack.status().verdict == rpb.VERDICT_PAUSED, "the watchdog to pause")
    expect(worker.get_by_text("recovery paused")).to_be_visible()
    worker.get_by_role("button", name="Resume").click()
    until(lambda: site.stack.status().verdict == rpb.VERDICT_HEALTHY, "the watchdog to resume")
    expect(worker.get_by_role("button", name="Pause recovery")).to_be_visible()


def test_hosts_are_drained_resumed_and_forgotten(page: Page, site: Site) -> None:
    """Hosts are shown with what HostService says of them, and an operator drains, resumes and forgets them."""
    site.stack.sql(
        "INSERT INTO servers (server_id, program, address, pid, version, schema_version, start_time, last_seen)"
        f" SELECT '{HOSTILE}:gateway', 'gateway', '', 1, '{HOSTILE}', 1, t, t"
        " FROM (SELECT clock_timestamp() - interval '2 h') AS long_ago (t)"
    )
    sign_in(page, site, view="#/workers")
    host = page.get_by_role("region", name=f"Host {socket.gethostname()}", exact=True)
    expect(host.get_by_text(re.compile(r"worker ready HEALTHY \d+/\d+"))).to_be_visible()
    host.get_by_text("Programs: ").click()
    expect(host.locator(".programs .row").filter(has_text="watchdog")).to_contain_text("running")
    host.get_by_role("button", name="Drain host").click()
    page.get_by_label("Reason").fill("new disk")
    page.get_by_role("button", name="Drain", exact=True).click()
    expect(host.get_by_text("drained (new disk)")).to_be_visible()
    expect(host.locator(".pill")).to_have_text("drained")
    check_accessible(page)
    host.get_by_role("button", name="Resume host").click()
    page.get_by_role("button", name="Resume", exact=True).last.click()
    expect(host.locator(".pill")).to_have_text("alive")
    gone = page.get_by_role("region", name=f"Host {HOSTILE}")
    expect(gone.locator(".pill")).to_have_text("lost")
    gone.get_by_role("button", name="Forget host").click()
    page.get_by_role("button", name="Forget", exact=True).click()
    expect(gone).to_have_count(0)
    assert not page.evaluate("window.hurt")


def test_a_reader_sees_its_tenant_and_changes_nothing(page: Page, site: Site, ended: str) -> None:
    """Who may only read sees the batches of its tenant alone, and no button that it may not press."""
    sign_in(page, site, "rita")
    expect(page.get_by_text("No batch yet")).to_be_visible()
    assert page.get_by_role("button", name="Submit a file").count() == 0
    page.goto(f"{site.url}#/batches/{ended}")
    expect(page.get_by_role("heading", name="Not there")).to_be_visible()
    page.goto(f"{site.url}#/workers")
    expect(page.get_by_role("heading", name="worker", exact=True)).to_be_visible()
    assert page.get_by_role("button", name=re.compile("Pause recovery|host")).count() == 0
    page.goto(f"{site.url}#/tenants")
    expect(page.locator(".tenants .row")).to_have_count(1)
    check_accessible(page)


@pytest.mark.thorough
def test_ten_thousand_batches(page: Page, site: Site) -> None:
    """The list of 10,000 batches comes page by page; each page has 50 and none twice."""
    site.stack.sql(
        "INSERT INTO batches (id, state, digest, metadata, priority, models, total, completed, end_time, tenant)"
        " SELECT n, 'completed', '', '{}', 0, '{tiny}', 10, 10, clock_timestamp(), 'many'"
        " FROM generate_series(1, 10000) n"
    )
    sign_in(page, site, view="#/batches?states=ended")
    rows, names = page.locator(".batches .row"), set()
    for _ in range(3):
        expect(rows).to_have_count(50)
        shown = page.locator(".batches .row-link").all_inner_texts()
        names |= set(shown)
        page.get_by_role("link", name="Older").click()
        expect(page.locator(".batches .row-link").first).not_to_have_text(shown[0])
    assert len(names) == 150
    check_accessible(page)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    site.stack.sql("DELETE FROM batches WHERE tenant = 'many'")
