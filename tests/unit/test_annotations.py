"""What each annotation means, and what is refused with which words."""

import math

import pytest

from criproxy.annotations import (
    IGNORED,
    KEYS,
    BadValue,
    PolicyError,
    markdown,
    nanoseconds,
    policy_of,
)
from criproxy.policy import Init, Policy, Port, Tier


def policy(**annotations: str) -> Policy:
    """A policy from keys of ours, with underscores for the hyphens."""
    result = policy_of({f"criproxy.io/{key.replace('_', '-')}": value for key, value in annotations.items()}, "")
    assert result is not None
    return result


def refusal(annotations: dict[str, str]) -> str:
    with pytest.raises(PolicyError) as caught:
        policy_of(annotations, "zeropod")
    return str(caught.value)


def tcp(*numbers: int) -> frozenset[Port]:
    return frozenset(Port("tcp", number) for number in numbers)


class TestOptIn:
    @pytest.mark.parametrize(
        "annotations",
        [
            {},
            {"kubernetes.io/config.seen": "2026-01-01"},
            {"status.criproxy.io/x": "1", "xcriproxy.io/tier": "freeze", "zeropod.ctrox.dev/unheard-of": "1"},
        ],
    )
    def test_a_pod_without_annotations_of_ours_is_no_business_of_ours(self, annotations: dict[str, str]) -> None:
        assert policy_of(annotations, "") is None
        assert policy_of(annotations, "runc") is None

    def test_the_handler_alone_opts_in_with_zeropods_defaults(self) -> None:
        result = policy_of({}, "zeropod")
        assert result == Policy(duration=60.0, container_names=None, ports={}, tier=Tier.AUTO)
        assert result.covers("any")

    @pytest.mark.parametrize("prefix", ["criproxy.io/", "zeropod.ctrox.dev/"])
    @pytest.mark.parametrize(
        ("key", "value"),
        [("container-names", "a"), ("ports-map", "a=1"), ("scaledown-duration", ""), ("disable-checkpointing", "f")],
    )
    def test_any_shared_key_opts_in_under_either_prefix(self, prefix: str, key: str, value: str) -> None:
        assert policy_of({prefix + key: value}, "") is not None

    def test_the_default_duration_can_be_another_one(self) -> None:
        result = policy_of({}, "zeropod", default_duration=300)
        assert result is not None
        assert result.duration == 300
        explicit = policy_of({"criproxy.io/scaledown-duration": "1s"}, "", default_duration=300)
        assert explicit is not None
        assert explicit.duration == 1


class TestPrefixes:
    def test_the_article_s_manifest_works_as_it_is(self) -> None:
        result = policy_of(
            {
                "zeropod.ctrox.dev/ports-map": "wordpress=80",
                "zeropod.ctrox.dev/container-names": "wordpress",
                "zeropod.ctrox.dev/scaledown-duration": "10s",
            },
            "zeropod",
        )
        assert result == Policy(10.0, frozenset({"wordpress"}), {"wordpress": tcp(80)})
        assert result.covers("wordpress")
        assert not result.covers("sidecar")

    def test_ours_wins_key_by_key(self) -> None:
        result = policy_of(
            {
                "criproxy.io/scaledown-duration": "5s",
                "zeropod.ctrox.dev/scaledown-duration": "10s",
                "zeropod.ctrox.dev/container-names": "web",
            },
            "",
        )
        assert result == Policy(5.0, frozenset({"web"}))

    def test_a_bad_value_that_doesnt_count_isnt_looked_at(self) -> None:
        annotations = {"criproxy.io/scaledown-duration": "5s", "zeropod.ctrox.dev/scaledown-duration": "soon"}
        assert policy_of(annotations, "") == Policy(5.0)

    def test_an_empty_value_is_none(self) -> None:
        annotations = {"criproxy.io/scaledown-duration": "", "zeropod.ctrox.dev/scaledown-duration": "10s"}
        assert policy_of(annotations, "") == Policy(10.0)
        assert policy(container_names="", ports_map="", tier="", init="", disable_checkpointing="") == Policy()

    def test_zeropods_other_keys_are_accepted_whatever_their_value_and_named(self) -> None:
        annotations = {f"zeropod.ctrox.dev/{key}": "?" for key in (*IGNORED, "unheard-of")}
        result = policy_of(annotations, "")
        assert result is not None
        assert result.ignored == tuple(sorted(annotations))
        assert len(IGNORED) == 8

    def test_keys_of_ours_alone_mean_nothing_under_zeropods_prefix(self) -> None:
        result = policy_of({"zeropod.ctrox.dev/tier": "freeze"}, "zeropod")
        assert result is not None
        assert result.tier is Tier.AUTO
        assert result.ignored == ("zeropod.ctrox.dev/tier",)


class TestUnknownKeys:
    def test_a_near_miss_is_answered_with_the_key_that_was_meant(self) -> None:
        assert "did you mean criproxy.io/scaledown-duration?" in refusal({"criproxy.io/scale-down-duration": "1s"})
        assert "did you mean criproxy.io/container-names?" in refusal({"criproxy.io/containerNames": "a"})
        assert "did you mean criproxy.io/ports-map?" in refusal({"criproxy.io/ports": "a=1"})

    def test_anything_else_with_the_keys_there_are(self) -> None:
        sentence = refusal({"criproxy.io/colour": "red"})
        assert sentence.startswith("criproxy.io/colour is no annotation that criproxy knows")
        assert all(key.name in sentence for key in KEYS)

    def test_a_key_that_only_zeropod_has(self) -> None:
        assert "zeropod.ctrox.dev/pre-dump has no counterpart" in refusal({"criproxy.io/pre-dump": "true"})


class TestDuration:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            # The cases of Go's own documentation and of its rules.
            ("0", 0),
            ("-0", 0),
            ("+0", 0),
            ("0m", 0),
            ("5s", 5_000_000_000),
            ("+5s", 5_000_000_000),
            ("-5s", -5_000_000_000),
            ("1478s", 1_478_000_000_000),
            ("5.0s", 5_000_000_000),
            ("5.s", 5_000_000_000),
            (".5s", 500_000_000),
            ("5.6s", 5_600_000_000),
            ("1.004s", 1_004_000_000),
            ("100.00100s", 100_001_000_000),
            ("10ns", 10),
            ("11us", 11_000),
            ("12µs", 12_000),
            ("12μs", 12_000),
            ("13ms", 13_000_000),
            ("14s", 14_000_000_000),
            ("15m", 900_000_000_000),
            ("16h", 57_600_000_000_000),
            ("3h30m", 12_600_000_000_000),
            ("10.5s4m", 250_500_000_000),
            ("1h2m3s4ms5us6ns", 3_723_004_005_006),
            ("39h9m14.425s", 140_954_425_000_000),
            ("52763797000ns", 52_763_797_000),
            ("0.3333333333333333333h", 1_200_000_000_000),
            ("9007199254740993ns", (1 << 53) + 1),
            ("9223372036854775807ns", (1 << 63) - 1),
            ("-9223372036854775808ns", -(1 << 63)),
            ("0.100000000000000000000h", 360_000_000_000),
            ("0.830103483285477580700h", 2_988_372_539_827),
        ],
    )
    def test_reads_what_go_reads(self, value: str, expected: int) -> None:
        assert nanoseconds(value) == expected

    @pytest.mark.parametrize(
        "value",
        ["", "3", "-", "s", ".", "-.", ".s", "+.s", "1d", "10 s", " 10s", "1h ", "x3s", "--1s", "1S", "1e3s", "٣s"],
    )
    def test_refuses_what_go_refuses(self, value: str) -> None:
        with pytest.raises(BadValue):
            nanoseconds(value)

    @pytest.mark.parametrize(
        "value", ["9223372036854775808ns", "9223372036854775.808us", "3000000h", "-9223372036854775809ns"]
    )
    def test_refuses_what_doesnt_fit(self, value: str) -> None:
        with pytest.raises(BadValue, match="292 years"):
            nanoseconds(value)

    def test_zero_is_never(self) -> None:
        assert policy(scaledown_duration="0").duration == 0

    def test_is_in_seconds(self) -> None:
        assert math.isclose(policy(scaledown_duration="1m0.25s").duration, 60.25)

    def test_negative_ones_are_refused(self) -> None:
        assert refusal({"zeropod.ctrox.dev/scaledown-duration": "-5s"}) == (
            'zeropod.ctrox.dev/scaledown-duration: "-5s" is negative; '
            'give a Go duration such as "90s", "1m30s" or "500ms", or "0" for never'
        )

    def test_a_bare_number_is_answered_with_what_may_be_meant(self) -> None:
        assert '"10" lacks a unit; "10s" would be seconds' in refusal({"criproxy.io/scaledown-duration": "10"})
        assert '"1d" has the unknown unit "d"' in refusal({"criproxy.io/scaledown-duration": "1d"})


class TestContainerNames:
    def test_a_list(self) -> None:
        assert policy(container_names="nginx, sidecar,").container_names == frozenset({"nginx", "sidecar"})

    def test_what_cant_be_a_name(self) -> None:
        assert 'holds "Web", which can\'t be the name of a container' in refusal({"criproxy.io/container-names": "Web"})
        assert "names no container" in refusal({"criproxy.io/container-names": " , "})


class TestPortsMap:
    def test_several_containers_with_several_ports(self) -> None:
        assert policy(ports_map="name=80,81;other=8080").ports == {"name": tcp(80, 81), "other": tcp(8080)}

    def test_the_same_container_twice_has_the_ports_of_both(self) -> None:
        assert policy(ports_map="a=80; a = 81 ;").ports == {"a": tcp(80, 81)}

    def test_protocols(self) -> None:
        ports = policy(ports_map="dns=53/udp,53/tcp,853").ports
        assert ports == {"dns": frozenset({Port("udp", 53), Port("tcp", 53), Port("tcp", 853)})}

    def test_a_container_that_isnt_covered_may_be_in_the_map(self) -> None:
        result = policy(ports_map="a=80;b=81", container_names="a")  # as in zeropod's own example
        assert result.ports.keys() == {"a", "b"}

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ("80", 'holds "80"; the form is "name=80,81;other=8080"'),
            ("=80", 'holds "=80"'),
            ("a=80=81", 'holds "a=80=81"'),
            ("a=", 'gives no port for "a"'),
            (";", "gives no port"),
            ("a=0", 'holds "0", which is no port: a number from 1 to 65535'),
            ("a=65536", 'holds "65536", which is no port'),
            ("a=http", 'holds "http", which is no port'),
            ("a=-1", 'holds "-1", which is no port'),
            ("a=٨٠", "which is no port"),
            ("a=80/sctp", 'holds the port "80/sctp" of an unknown protocol'),
            ("a_b=80", 'holds "a_b", which can\'t be the name of a container'),
            ("a=80;b=80", 'gives port 80/tcp to both "a" and "b"'),
        ],
    )
    def test_what_is_refused(self, value: str, reason: str) -> None:
        sentence = refusal({"zeropod.ctrox.dev/ports-map": value})
        assert sentence.startswith(f'zeropod.ctrox.dev/ports-map: "{value}" ')
        assert reason in sentence


class TestTier:
    def test_disable_checkpointing_depends_on_the_prefix(self) -> None:
        theirs = policy_of({"zeropod.ctrox.dev/disable-checkpointing": "true"}, "")
        assert theirs is not None
        assert theirs.tier is Tier.RESTART
        assert policy(disable_checkpointing="true").tier is Tier.FREEZE

    @pytest.mark.parametrize("value", ["1", "t", "T", "TRUE", "true", "True"])
    def test_true_as_go_knows_it(self, value: str) -> None:
        assert policy(disable_checkpointing=value).tier is Tier.FREEZE

    @pytest.mark.parametrize("value", ["0", "f", "F", "FALSE", "false", "False"])
    def test_false_as_go_knows_it(self, value: str) -> None:
        assert policy(disable_checkpointing=value).tier is Tier.AUTO

    def test_anything_else_isnt_a_boolean(self) -> None:
        assert '"yes" is neither "true" nor "false"' in refusal({"criproxy.io/disable-checkpointing": "yes"})

    @pytest.mark.parametrize(
        ("ours", "expected"),
        [
            ({"disable-checkpointing": "false"}, Tier.AUTO),
            ({"disable-checkpointing": "true"}, Tier.FREEZE),
            ({"tier": "auto"}, Tier.AUTO),
            ({"tier": "checkpoint"}, Tier.CHECKPOINT),
            ({"tier": "freeze"}, Tier.FREEZE),
            ({"tier": "auto", "disable-checkpointing": "true"}, Tier.FREEZE),
        ],
    )
    def test_ours_wins_over_zeropods(self, ours: dict[str, str], expected: Tier) -> None:
        annotations = {f"criproxy.io/{key}": value for key, value in ours.items()}
        result = policy_of(annotations | {"zeropod.ctrox.dev/disable-checkpointing": "true"}, "")
        assert result is not None
        assert result.tier is expected

    def test_a_contradiction(self) -> None:
        assert "contradicts criproxy.io/disable-checkpointing" in refusal(
            {"criproxy.io/tier": "checkpoint", "criproxy.io/disable-checkpointing": "true"}
        )

    def test_no_such_tier(self) -> None:
        assert refusal({"criproxy.io/tier": "Freezer"}) == (
            'criproxy.io/tier: "Freezer" is none of auto, checkpoint, freeze; did you mean "freeze"?'
        )


@pytest.mark.parametrize("value", list(Init))
def test_init(value: Init) -> None:
    assert policy(init=value.value).init is value


def test_a_long_value_is_shortened_in_the_sentence() -> None:
    assert len(refusal({"criproxy.io/ports-map": "a" * 100_000})) < 600
    assert "a" * 77 + '..."' in refusal({"criproxy.io/tier": "a" * 100_000})


def test_the_docs_have_a_row_for_every_key() -> None:
    text = markdown()
    assert all(f"`criproxy.io/{key.name}`" in text for key in KEYS)
    assert all(f"`zeropod.ctrox.dev/{name}`" in text for name in IGNORED)


class TestTraffic:
    def test_defaults(self) -> None:
        found = policy(tier="auto")
        assert (found.quiet_ports, found.request_timeout, found.connections) == (frozenset(), 600.0, "preserve")

    def test_given(self) -> None:
        found = policy(quiet_ports="9100, 9102/udp", request_timeout="1m30s", connections="close")
        assert found.quiet_ports == {Port("tcp", 9100), Port("udp", 9102)}
        assert (found.request_timeout, found.connections) == (90.0, "close")

    def test_on_stop(self) -> None:
        assert (policy(tier="auto").on_stop, policy(on_stop="kill").on_stop) == ("restore", "kill")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("quiet-ports", ",", "gives no port"),
            ("quiet-ports", "web=9100", 'such as "9100,9102"'),
            ("request-timeout", "-1s", "is negative"),
            ("connections", "closed", 'did you mean "close"'),
            ("on-stop", "stop", "is none of restore, kill"),
        ],
    )
    def test_refused(self, key: str, value: str, message: str) -> None:
        assert message in refusal({f"criproxy.io/{key}": value})

    def test_a_port_cannot_be_quiet_and_wake(self) -> None:
        text = refusal({"criproxy.io/quiet-ports": "9100,80", "zeropod.ctrox.dev/ports-map": "web=80"})
        assert '80/tcp, at which ports-map says that a packet wakes "web"' in text
