"""Settings for every test."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "unit",
    deadline=None,  # a busy machine is no failure
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("unit")


def pytest_addoption(parser):
    parser.addoption(
        "--golden-rewrite",
        action="store_true",
        help="write what tests/golden compare with anew (make golden)",
    )
