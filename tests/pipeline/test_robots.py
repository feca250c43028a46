"""Opt-out signals of publishers: how they are parsed, and that they are obeyed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_host import (
    BODY,
    FakeHost,
    by_path,
    client_for,
    failure_detail,
    failure_kind,
    in_sequence,
    redirect,
    response,
)
from hypothesis import given
from hypothesis import strategies as st

from pmd_pipeline.images.fetch.robots import (
    MAX_ROBOTS_BYTES,
    RobotsCache,
    RobotsRules,
    is_tdm_reserved,
    opt_out_directive,
)
from pmd_pipeline.recipe import SIGNALS

DATE = "unavailable_after: Wednesday, 25-Jun-10 15:00:00 PST"


@pytest.mark.parametrize(
    "headers",
    [
        ["noai"],
        ["noimageai"],
        ["noindex"],
        ["noimageindex"],
        ["none"],
        ["noml"],
        ["NoAI"],
        ["  noindex\t"],
        ["nofollow, noai"],
        ["noai,nofollow"],
        ["noai, max-snippet: 20"],
        ["max-snippet: 20, noai"],
        ["max-snippet:20,max-image-preview: large , noai"],
        [f"{DATE}, noai"],
        [f"noai, {DATE}"],
        ["unavailable_after: 2010-06-25T15:00:00Z, noindex"],
        ["all", "noai"],
        ["googlebot: nofollow", "noindex"],
        ["*: noindex"],
        ["robots: noai"],
        ["pmd-flava: noai"],
        ["PMD-Flava : nofollow, noai"],
        ["pmd-flava/1.0: noindex"],
        ["googlebot: noindex, pmd-flava: noai"],
        ["googlebot: noindex, *: none"],
        ["pmd-flava: max-snippet: 5, noai"],
        ["noindex: true"],
        ["noai;nofollow"],
        ["noindex nofollow"],
        [",, ,noai,,"],
        ["²: x", "noai"],
    ],
)
def test_a_directive_for_us_is_found(headers):
    assert opt_out_directive(headers)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["all"],
        ["index, follow"],
        ["nofollow, noarchive, nosnippet, notranslate"],
        ["max-snippet: 20"],
        ["max-image-preview: none"],
        ["max-image-preview:none, nofollow"],
        [DATE],
        ["unavailable_after: 25 Jun 2010 15:00:00 PST"],
        ["googlebot: noindex"],
        ["googlebot: nofollow, noindex"],
        ["googlebot: max-snippet: 5, noai"],
        ["otherbot/2.1: noindex, nofollow", "googlebot: none"],
        ["noaid"],
        ["no ai"],
        [":"],
        [":::,:"],
        ["pmd-flava:"],
        ["pmd-flavour: noai"],
        ["\x00\xff"],
    ],
)
def test_a_directive_for_others_or_about_other_uses_is_ignored(headers):
    assert opt_out_directive(headers) is None


@given(st.lists(st.text(alphabet="noaindex:,;* -/_", max_size=40) | st.text(max_size=20)))
def test_no_header_raises_an_exception(headers):
    opt_out_directive(headers)
    is_tdm_reserved(headers)


@pytest.mark.parametrize(
    ("headers", "reserved"),
    [
        (["1"], True),
        ([" 1 "], True),
        (["0", "1"], True),
        (["0, 1"], True),
        (["0"], False),
        ([], False),
        ([""], False),
        (["true"], False),
        (["11"], False),
    ],
)
def test_mining_is_reserved_by_the_value_1(headers, reserved):
    assert is_tdm_reserved(headers) is reserved


def for_all(*lines):
    return "\n".join(["User-agent: *", *lines]).encode()


@pytest.mark.parametrize(
    ("lines", "path", "allowed"),
    [
        ([], "/1.jpg", True),
        (["Disallow: /"], "/1.jpg", False),
        (["Disallow: /"], "/robots.txt", True),
        (["Disallow:"], "/1.jpg", True),
        (["Disallow: /a"], "/abc", False),
        (["Disallow: /a/"], "/a", True),
        (["Disallow: /A"], "/a", True),
        # the longest match decides, in any order; of equal ones, Allow wins
        (["Disallow: /a", "Allow: /a/b"], "/a/b.jpg", True),
        (["Allow: /a/b", "Disallow: /a"], "/a/c.jpg", False),
        (["Allow: /a", "Disallow: /a/b"], "/a/b.jpg", False),
        (["Disallow: /a", "Allow: /a"], "/a", True),
        (["Allow: /p", "Disallow: /"], "/page", True),
        (["Allow: /folder", "Disallow: /folder"], "/folder/page", True),
        (["Allow: /page", "Disallow: /*.htm"], "/page.htm", False),
        (["Allow: /page", "Disallow: /*.ph"], "/page.php5", True),
        (["Allow: /$", "Disallow: /"], "/", True),
        (["Allow: /$", "Disallow: /"], "/page.htm", False),
        # wildcards and anchors
        (["Disallow: /*.gif$"], "/a/b.gif", False),
        (["Disallow: /*.gif$"], "/a/b.gif?x", True),
        (["Disallow: /*.gif$"], "/a.gif/b.gif", False),
        (["Disallow: /*/private/*.jpg"], "/a/private/b/c.jpg?x=1", False),
        (["Disallow: *.jpg"], "/1.jpg", False),
        (["Disallow: /a**b"], "/axb", False),
        (["Disallow: /*a$"], "/aaba", False),
        (["Disallow: /ab*ba$"], "/aba", True),
        (["Disallow: /*$"], "/1.jpg", False),
        (["Disallow: /?x="], "/?x=1", False),
        (["Disallow: images"], "/images", True),
        # equivalent spellings
        (["Disallow: /a%3cd"], "/a%3Cd.jpg", False),
        (["Disallow: /%61"], "/abc", False),
        (["Disallow: /a"], "/%61bc", False),
        (["Disallow: /a%2Fb"], "/a/b", True),
        (["Disallow: /a/b"], "/a%2Fb", True),
        (["Disallow: /ü"], "/%C3%BC.jpg", False),
        (["Disallow: /%c3%bc"], "/%C3%BC.jpg", False),
        (['Disallow: /"a"'], "/%22a%22", False),
        (["Disallow: /a%2Ab"], "/a*b", False),
        (["Disallow: /a%2Ab"], "/axb", True),
        (["Disallow: /a%24"], "/a$", False),
        (["Disallow: /a$b"], "/a$b", False),
        (["Disallow: /%"], "/%zz", False),
        # syntax of lines
        (["DISALLOW : /a # why"], "/a", False),
        (["Disallow /a"], "/a", True),
        (["Sitemap: x", "Disallow: /a"], "/a", False),
        (["Disallow: /a#b"], "/a", False),
    ],
)
def test_the_longest_match_decides(lines, path, allowed):
    assert RobotsRules.parse(for_all(*lines)).allows(path) is allowed


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("before", ["", "\ufeff", "# a comment\n\n", "junk\n\x00\n"])
@pytest.mark.parametrize(
    ("lines", "allowed"),
    [
        ("User-agent: other|Disallow: /", True),
        ("User-agent: *|Disallow: /|User-agent: pmd-flava|Allow: /", True),
        ("User-agent: pmd-flava|Disallow: /|User-agent: *|Allow: /", False),
        ("User-agent: *|Disallow: /|User-agent: pmd-flava", True),
        ("User-agent: PMD-Flava/2.0 (x)|Disallow: /", False),
        ("User-agent: pmd-flavour|Disallow: /", True),
        ("User-agent: pmd|Disallow: /", True),
        ("User-agent: other|User-agent: pmd-flava|Disallow: /", False),
        ("User-agent: pmd-flava|Crawl-delay: 1|User-agent: other|Disallow: /", False),
        ("User-agent: pmd-flava|Allow: /x|User-agent: other|Disallow: /", True),
        ("User-agent: pmd-flava|Allow: /x|User-agent: pmd-flava|Disallow: /", False),
        ("User-agent: *|Allow: /x|User-agent: *|Disallow: /", False),
        ("Disallow: /|User-agent: *|Allow: /x", True),
        ("user-AGENT:pmd-flava|dISALLOW:/", False),
        ("User-agent:|Disallow: /", True),
        ("<html>|<body>User-agent: *|Disallow: /", True),
    ],
)
def test_the_groups_with_our_name_replace_those_for_all(lines, allowed, before, end):
    content = (before + lines.replace("|", "\n")).replace("\n", end).encode()

    assert RobotsRules.parse(content).allows("/1.jpg") is allowed


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        ("Crawl-delay: 2", 2),
        ("crawl-DELAY:0.5 # please", 0.5),
        ("Crawl-delay: 86400", 30),
        ("Crawl-delay: soon", 0),
        ("Crawl-delay: -1", 0),
        ("Crawl-delay: 1e9", 0),
        ("Crawl-delay:", 0),
        ("Crawl-delay: 1|Crawl-delay: 3", 3),
        ("Crawl-delay: 9||User-agent: pmd-flava|Crawl-delay: 1", 1),
        ("Crawl-delay: 9||User-agent: pmd-flava|Disallow: /x", 0),
    ],
)
def test_crawl_delay_is_parsed_and_limited(lines, seconds):
    assert RobotsRules.parse(for_all(*lines.split("|"))).delay == seconds


def test_lines_beyond_the_limit_and_an_incomplete_last_rule_are_ignored():
    start = for_all("Disallow: /a", "")
    rule = b"Disallow: /private\n"
    padding = b"#" * (MAX_ROBOTS_BYTES - len(start) - len("Disallow: /") - 1) + b"\n"

    robots = RobotsRules.parse(start + padding + rule)

    assert not robots.allows("/a")
    assert robots.allows("/private")
    assert robots.allows("/1.jpg")


def test_matching_time_is_linear():
    robots = RobotsRules.parse(for_all("Disallow: /" + "*a" * 5000 + "$"))

    assert robots.allows("/" + "a" * 4999 + "b")


@given(st.binary(max_size=300), st.text(alphabet="/a%2*$?é".replace("é", ""), max_size=20))
def test_no_robots_txt_raises_an_exception(content, path):
    RobotsRules.parse(content).allows("/" + path)
    RobotsRules.parse(b"User-agent: *\nDisallow: " + content).allows("/" + path)


def test_rules_are_cached_for_a_day():
    cache, robots = RobotsCache(), RobotsRules()
    cache.put("known", robots, 100)

    assert cache.get("known", 100 + 86_399) is robots
    assert cache.get("known", 100 + 86_400) is None
    assert cache.get("unknown", 0) is None


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), max_size=60))
def test_the_cache_stays_within_its_limit(entries):
    cache = RobotsCache(max_rules=10)
    for origin, size in entries:
        cache.put(str(origin), RobotsRules(((b"/", True),) * size), 0)

        assert cache.get(str(origin), 0) is not None
        weights = [1 + len(robots.rules) for robots, _ in cache._entries.values()]
        assert sum(weights) == cache._weight
        assert sum(weights) <= 10 or len(weights) == 1


def host_with_robots(robots, image=None):
    return FakeHost(by_path({"/robots.txt": robots, "/1.jpg": image or response()}))


FORBIDDEN = for_all("Disallow: /*.jpg$")


def test_a_url_that_robots_txt_forbids_is_not_requested():
    with host_with_robots(response(body=FORBIDDEN)) as host:
        client = client_for(host, respect=SIGNALS)

        assert failure_kind(client) == "robots"
        assert failure_kind(client) == "robots"

    assert host.paths == ["/robots.txt"]


def test_robots_txt_is_requested_once_for_all_images_of_a_host():
    with FakeHost(lambda head: response(404 if "robots" in head else 200)) as host:
        with ThreadPoolExecutor(8) as pool:
            client = client_for(host, respect=SIGNALS)
            urls = [f"http://{name}.example/{n}.jpg" for n in range(10) for name in "ab"]
            bodies = [fetched.body for fetched in pool.map(client.get, urls)]

        assert bodies == [BODY] * 20
        assert host.paths.count("/robots.txt") == 2
        assert len(host.requests) == 22


def test_the_robots_txt_of_each_redirect_is_obeyed():
    pages = {
        "/1.jpg": redirect("http://b.example/2.jpg"),
        "/2.jpg": response(),
    }

    def respond(head):
        path = head.split(" ")[1]
        if path == "/robots.txt":
            return response(body=FORBIDDEN) if "Host: b.example\r" in head else response(404)
        return pages[path]

    with FakeHost(respond) as host:
        assert failure_kind(client_for(host, respect=SIGNALS)) == "robots"

    assert host.paths == ["/robots.txt", "/1.jpg", "/robots.txt"]


@pytest.mark.parametrize(
    "robots",
    [
        response(404),
        response(401),
        response(403),
        response(410),
        response(204, b""),
        response(body=b""),
        response(body=b"<html>hello</html>"),
        redirect("/robots.txt"),
        redirect("file:///etc/passwd"),
        redirect("http://someone@b.example/"),
    ],
)
def test_a_host_without_rules_forbids_nothing(robots):
    with host_with_robots(robots) as host:
        assert client_for(host, respect=SIGNALS).get("http://a.example/1.jpg").body == BODY


def test_robots_txt_may_be_redirected():
    with FakeHost(
        by_path(
            {"/robots.txt": redirect("http://b.example/x"), "/x": response(body=FORBIDDEN)},
        )
    ) as host:
        assert failure_kind(client_for(host, respect=SIGNALS)) == "robots"


@pytest.mark.parametrize(
    ("robots", "kind"),
    [
        (response(500), "http_5xx"),
        (response(503), "http_5xx"),
        (response(429), "http_429"),
        (response(Content_Length=1 << 20, Connection="close"), "connect"),
    ],
)
def test_without_an_answer_for_robots_txt_no_image_is_requested(robots, kind):
    with host_with_robots(robots) as host:
        assert failure_kind(client_for(host, respect=SIGNALS)) == kind

    assert host.paths == ["/robots.txt"] * 3


def test_robots_txt_is_retried():
    responses = in_sequence(response(503), response(404), response())
    with FakeHost(responses) as host:
        assert client_for(host, respect=SIGNALS).get("http://a.example/1.jpg").body == BODY

    assert host.paths == ["/robots.txt", "/robots.txt", "/1.jpg"]


def test_concurrent_fetches_share_one_failure_of_robots_txt():
    requested, go_on = threading.Event(), threading.Event()

    def respond_late(_head):
        requested.set()
        go_on.wait(5)
        return response(503)

    with FakeHost(respond_late) as host, ThreadPoolExecutor(4) as pool:
        client = client_for(host, respect=SIGNALS, retries=0)
        kinds = [pool.submit(failure_kind, client) for _ in range(4)]
        requested.wait(5)
        while "http://a.example" not in client._robots_tasks:
            pass
        go_on.set()

        assert [kind.result() for kind in kinds] == ["http_5xx"] * 4

    assert len(host.requests) <= 4


def test_an_endless_robots_txt_is_read_to_the_limit():
    def send(connection):
        connection.sendall(response(body=FORBIDDEN, Content_Length=""))
        while True:
            connection.sendall(b"\n# nothing" * 1000)

    with FakeHost(lambda _head: send) as host:
        assert failure_kind(client_for(host, respect=SIGNALS)) == "robots"


@pytest.mark.parametrize(
    ("headers", "detail"),
    [
        ({"X_Robots_Tag": "noai"}, "X-Robots-Tag: noai"),
        ({"X_Robots_Tag": "nofollow\r\nX-Robots-Tag: none"}, "X-Robots-Tag: none"),
        ({"TDM_Reservation": "1"}, "TDM-Reservation: 1"),
        (
            {"TDM_Reservation": "1", "TDM_Policy": "https://a.example/p"},
            "TDM-Reservation: 1, terms at 'https://a.example/p'",
        ),
    ],
)
def test_an_image_whose_response_opts_out_is_not_kept(headers, detail):
    with host_with_robots(response(404), response(**headers)) as host:
        client = client_for(host, respect=SIGNALS)

        assert failure_kind(client) == "opt_out"
        assert failure_detail(client) == detail

    assert host.paths == ["/robots.txt", "/1.jpg", "/1.jpg"]  # final, so without a retry


@pytest.mark.parametrize(
    ("respect", "kind"),
    [
        (("robots",), "robots"),
        (("x-robots-tag",), "opt_out"),
        (("tdm",), "opt_out"),
    ],
)
def test_a_recipe_may_respect_fewer_signals(respect, kind):
    image = {"tdm": response(TDM_Reservation="1")}.get(respect[0], response(X_Robots_Tag="noai"))
    with host_with_robots(response(body=FORBIDDEN), image) as host:
        assert failure_kind(client_for(host, respect=respect)) == kind
        assert client_for(host).get("http://a.example/1.jpg").body == BODY


def test_requests_respect_the_crawl_delay():
    waits = []
    with host_with_robots(response(body=for_all("Crawl-delay: 2"))) as host:
        client = client_for(host, waits, respect=SIGNALS)
        for _ in range(3):
            client.get("http://a.example/1.jpg")
        client_for(host, waits).get("http://a.example/1.jpg")
        one_of_three = client_for(host, waits, respect=SIGNALS, workers=3)
        for _ in range(2):
            one_of_three.get("http://a.example/1.jpg")

    assert waits == [2, 2, 6]
