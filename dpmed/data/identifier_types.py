"""What kinds of identifier there are: the 18 classes of HIPAA's Safe Harbor, quasi-identifiers, and their many names.

A type's name is what stands in a span's `type`. Data sets and taggers name the same thing differently (PATIENT, PERSON,
PER): `canonical_type` maps their names here. A name that is not known stays as it is and counts as direct, since nobody
said that it is harmless.

Reference: 45 CFR 164.514(b)(2)(i), letters A to R.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SAFE_HARBOR = {
    "A": "names",
    "B": "geographic subdivisions smaller than a state",
    "C": "dates (except the year) and ages over 89",
    "D": "telephone numbers",
    "E": "fax numbers",
    "F": "email addresses",
    "G": "social security numbers",
    "H": "medical record numbers",
    "I": "health plan beneficiary numbers",
    "J": "account numbers",
    "K": "certificate and license numbers",
    "L": "vehicle identifiers, serial numbers and plates",
    "M": "device identifiers and serial numbers",
    "N": "URLs",
    "O": "IP addresses",
    "P": "biometric identifiers",
    "Q": "full-face photographs",
    "R": "any other unique identifying number, characteristic or code",
}
"""Letter of the rule -> what must be removed."""


@dataclass(frozen=True, slots=True)
class IdentifierType:
    """A kind of identifier.

    `safe_harbor` is the letter of its class, None for a quasi-identifier: one that points to a patient only together
    with others.
    """

    name: str
    safe_harbor: str | None
    meaning: str

    @property
    def direct(self) -> bool:
        return self.safe_harbor is not None


_TYPES = (
    IdentifierType("NAME", "A", "name of a patient, relative or household member"),
    IdentifierType("DOCTOR", "A", "name of a doctor or of other staff"),
    IdentifierType("ADDRESS", "B", "street address or post office box"),
    IdentifierType("LOCATION", "B", "city, county, room: any place smaller than a state"),
    IdentifierType("ZIP", "B", "postal code"),
    IdentifierType("HOSPITAL", "B", "hospital, clinic or ward by name"),
    IdentifierType("DATE", "C", "day of birth, of a visit, of death"),
    IdentifierType("AGE_OVER_89", "C", "an age of 90 or more"),
    IdentifierType("PHONE", "D", "telephone or pager number"),
    IdentifierType("FAX", "E", "fax number"),
    IdentifierType("EMAIL", "F", "email address"),
    IdentifierType("SSN", "G", "social security number"),
    IdentifierType("MRN", "H", "medical record number"),
    IdentifierType("HEALTH_PLAN", "I", "insurance policy or member number"),
    IdentifierType("ACCOUNT", "J", "account or card number"),
    IdentifierType("LICENSE", "K", "licence or certificate number, provider number"),
    IdentifierType("VEHICLE", "L", "vehicle identification number or plate"),
    IdentifierType("DEVICE", "M", "serial number of a device"),
    IdentifierType("URL", "N", "web address"),
    IdentifierType("IP", "O", "IP address"),
    IdentifierType("BIOMETRIC", "P", "finger or voice print"),
    IdentifierType("PHOTO", "Q", "photograph or a reference to one"),
    IdentifierType("ID", "R", "any other number or code: case, specimen, passport"),
    IdentifierType("AGE", None, "an age below 90"),
    IdentifierType("PROFESSION", None, "occupation"),
    IdentifierType("RARE_CONDITION", None, "a condition that few patients have"),
    IdentifierType("PLACE", None, "state, country or larger region"),
    IdentifierType("ORGANIZATION", None, "employer, school, company"),
    IdentifierType("SEX", None, "sex or gender"),
    IdentifierType("ETHNICITY", None, "nationality, ethnic, religious or political group"),
    IdentifierType("LANGUAGE", None, "language spoken"),
    IdentifierType("FAMILY", None, "marital status, children, household"),
    IdentifierType("INDIRECT", None, "a word in the records of fewer than k patients"),
)

IDENTIFIER_TYPES = {kind.name: kind for kind in _TYPES}
"""Name -> type, direct ones first, in the order of the rule."""

# What data sets (i2b2 / n2c2 2006 and 2014, ASQ-PHI, CoNLL), taggers (Presidio, the Stanford de-identifier) and columns
# of patient tables call them. Names that are ours already are not repeated.
_NAMES = {
    "NAME": "PATIENT PERSON PER PATIENT_NAME FIRST_NAME LAST_NAME FULL_NAME GIVEN_NAME FAMILY_NAME SURNAME FORENAME "
    "MIDDLE_NAME MAIDEN_NAME RELATIVE RELATIVE_NAME",
    "DOCTOR": "HCW PHYSICIAN STAFF CLINICIAN PROVIDER DOCTOR_NAME PROVIDER_NAME NURSE",
    "ADDRESS": "STREET STREET_ADDRESS HOME_ADDRESS",
    "LOCATION": "LOC CITY COUNTY TOWN ROOM GEOGRAPHIC_LOCATION LOCATION_OTHER GPE FAC",
    "ZIP": "ZIPCODE ZIP_CODE POSTCODE POSTAL_CODE",
    "HOSPITAL": "CLINIC DEPARTMENT WARD",
    "DATE": "DATE_TIME DOB BIRTH_DATE BIRTHDATE DATE_OF_BIRTH DEATH_DATE DATE_OF_DEATH ADMISSION_DATE DISCHARGE_DATE "
    "VISIT_DATE",
    "AGE_OVER_89": "AGE_ABOVE_89 AGE90",
    "PHONE": "TELEPHONE TEL PHONE_NUMBER MOBILE MOBILE_NUMBER CELL PAGER CONTACT",
    "FAX": "FAX_NUMBER",
    "EMAIL": "EMAIL_ADDRESS E_MAIL MAIL",
    "SSN": "US_SSN SOCIAL_SECURITY_NUMBER US_ITIN",
    "MRN": "MEDICALRECORD MEDICAL_RECORD MEDICAL_RECORD_NUMBER RECORD_NUMBER MEDICAL_RECORD_NO",
    "HEALTH_PLAN": "HEALTHPLAN HEALTH_PLAN_BENEFICIARY_NUMBER HEALTH_PLAN_NUMBER INSURANCE INSURANCE_NUMBER US_MBI "
    "UK_NHS MEMBER_ID POLICY_NUMBER",
    "ACCOUNT": "ACCOUNT_NUMBER CREDIT_CARD IBAN IBAN_CODE US_BANK_NUMBER CRYPTO",
    "LICENSE": "CERTIFICATE_LICENSE_NUMBER LICENSE_NUMBER MEDICAL_LICENSE US_DRIVER_LICENSE US_NPI NPI",
    "VEHICLE": "VEHICLE_IDENTIFIER VEHICLE_ID VIN LICENSE_PLATE",
    "DEVICE": "DEVICE_IDENTIFIER DEVICE_ID MAC_ADDRESS SERIAL_NUMBER",
    "URL": "WEB_URL WEBSITE",
    "IP": "IP_ADDRESS IPADDR IPADDRESS",
    "BIOMETRIC": "BIOID BIOMETRIC_IDENTIFIER",
    "PHOTO": "PHOTOGRAPH FULL_FACE_PHOTO FULL_FACE_PHOTOGRAPH",
    "ID": "IDNUM UNIQUE_IDENTIFIER OTHER_ID USERNAME US_PASSPORT PASSPORT NATIONAL_ID",
    "PROFESSION": "OCCUPATION JOB",
    "RARE_CONDITION": "RARE_DISEASE",
    "PLACE": "STATE COUNTRY REGION NATION",
    "ORGANIZATION": "ORG ORGANISATION EMPLOYER VENDOR SCHOOL",
    "SEX": "GENDER",
    "ETHNICITY": "NRP RACE NATIONALITY RELIGION NORP",
    "FAMILY": "MARITAL_STATUS",
}
_CANONICAL = {alias: name for name, aliases in _NAMES.items() for alias in aliases.split()} | {
    name: name for name in IDENTIFIER_TYPES
}


def is_known_type(name: str) -> bool:
    """Whether `canonical_type` knows this name."""
    return _normal(name) in _CANONICAL


def canonical_type(name: str) -> str:
    """The name used here for a type that another data set, tagger or table calls `name`; itself if it is not known.

    Case does not matter, nor whether blanks, hyphens or underscores join its words.
    """
    normal = _normal(name)
    return _CANONICAL.get(normal, normal)


def is_direct(name: str) -> bool:
    """Whether a type identifies by itself: Safe Harbor names its class, or the type is not known."""
    kind = IDENTIFIER_TYPES.get(canonical_type(name))
    return kind is None or kind.direct


def _normal(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.strip()).strip("_").upper()
