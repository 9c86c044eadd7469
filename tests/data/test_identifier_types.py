"""The taxonomy covers Safe Harbor, and every name of the data sets that dpmed reads leads into it."""

from __future__ import annotations

import pytest

from dpmed.data.hospital_text import IDENTIFIER_FIELDS
from dpmed.data.identifier_types import IDENTIFIER_TYPES, SAFE_HARBOR, canonical_type, is_direct, is_known_type


def test_every_class_of_safe_harbor_has_a_type() -> None:
    assert list(SAFE_HARBOR) == list("ABCDEFGHIJKLMNOPQR")
    assert {kind.safe_harbor for kind in IDENTIFIER_TYPES.values()} == {*SAFE_HARBOR, None}


def test_quasi_identifiers_are_not_direct() -> None:
    quasi = {name for name, kind in IDENTIFIER_TYPES.items() if not kind.direct}
    assert quasi >= {"AGE", "PROFESSION", "RARE_CONDITION", "PLACE", "INDIRECT"}
    assert not any(map(is_direct, quasi)) and all(map(is_direct, set(IDENTIFIER_TYPES) - quasi))


@pytest.mark.parametrize(
    ("names", "canonical"),
    [
        # i2b2 / n2c2 2006
        (
            "PATIENT DOCTOR HOSPITAL ID DATE LOCATION PHONE AGE",
            "NAME DOCTOR HOSPITAL ID DATE LOCATION PHONE AGE",
        ),
        # i2b2 / n2c2 2014
        (
            "MEDICALRECORD HEALTHPLAN STREET LOCATION-OTHER STATE IPADDR BIOID IDNUM PROFESSION ZIP",
            "MRN HEALTH_PLAN ADDRESS LOCATION PLACE IP BIOMETRIC ID PROFESSION ZIP",
        ),
        # Presidio
        (
            "PERSON EMAIL_ADDRESS PHONE_NUMBER US_SSN IP_ADDRESS DATE_TIME NRP CREDIT_CARD URL MEDICAL_LICENSE",
            "NAME EMAIL PHONE SSN IP DATE ETHNICITY ACCOUNT URL LICENSE",
        ),
        # ASQ-PHI
        (
            "NAME GEOGRAPHIC_LOCATION UNIQUE_IDENTIFIER MEDICAL_RECORD_NUMBER HEALTH_PLAN_BENEFICIARY_NUMBER "
            "SOCIAL_SECURITY_NUMBER CERTIFICATE_LICENSE_NUMBER FAX_NUMBER ACCOUNT_NUMBER",
            "NAME LOCATION ID MRN HEALTH_PLAN SSN LICENSE FAX ACCOUNT",
        ),
        # Spellings
        ("date-of-birth first_name Zip", "DATE NAME ZIP"),
    ],
)
def test_names_of_data_sets(names: str, canonical: str) -> None:
    assert [canonical_type(name) for name in names.split()] == canonical.split()
    assert all(map(is_known_type, names.split()))


def test_the_hospitals_types_are_of_the_taxonomy() -> None:
    assert set(IDENTIFIER_FIELDS.values()) <= set(IDENTIFIER_TYPES)


def test_an_unknown_type_stays_and_is_direct() -> None:
    assert canonical_type("tattoo") == "TATTOO" and is_direct("tattoo") and not is_known_type("tattoo")


def test_names_lead_to_types_and_stay_there() -> None:
    for name in IDENTIFIER_TYPES:
        assert canonical_type(name) == canonical_type(name.lower()) == name
