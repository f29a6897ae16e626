"""Words and lists that decide whether a pattern is personal data. Plain data: no rule lives here."""

import re


def _words(alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE)


def word_set(words: str) -> frozenset[str]:
    """The words of a blank-separated list."""
    return frozenset(words.split())


MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")

EXAMPLE_DOMAINS = frozenset({"example.com", "example.org", "example.net"})  # RFC 2606: nobody's
ROLE_LOCALS = word_set(
    "abuse admin billing careers contact donotreply enquiries hello help helpdesk hr info inquiries jobs mail media"
    " newsletter no-reply noreply office postmaster press privacy sales security service support team webmaster"
)
PERSONAL_HOSTS = word_set(
    "facebook.com fb.com instagram.com twitter.com x.com tiktok.com snapchat.com linkedin.com t.me wa.me vk.com"
    " onlyfans.com venmo.com paypal.me cash.app"
)
PERSONAL_PATH = re.compile(
    r"/(?:users?|u|profiles?|people|members?|therapists?|counsell?ors?|staff)/[^/?#]+|/~\w|/@\w", re.IGNORECASE
)

PHONE_CONTEXT = _words(
    "phone|telephone|tel|cell|mobile|call|calling|called|text|texted|sms|fax|dial|ring|whatsapp|reach|contact|number|num"
)
BARE_NUMBER_REFUSED = re.compile(
    r"\b(?:order|invoice|tracking|ticket|reference|ref|case|claim|policy|serial|item|product|isbn|confirmation|booking"
    r"|account|transaction|version|build)\b[^.!?\n]{0,20}$",
    re.IGNORECASE,
)
HELPLINE = _words("hot ?line|help ?line|life ?line|crisis line|warm ?line|safe ?line|crisis text")
CARD_CONTEXT = _words("card|visa|mastercard|amex|credit|debit|cc")
SSN_CONTEXT = _words("ssn|ssns|social security|social|tax id|taxpayer")
IP_CONTEXT = _words("ip|ipv4|address|host|server|ping|router|network|login|logged")
VERSION_CONTEXT = re.compile(
    r"(?:\b(?:v|ver|version|versions|release|build|firmware|section|chapter|ios|android|python)\b[\s.:'\"“(]*|§ ?)$",
    re.IGNORECASE,
)
DOB_REFUSED = _words(
    "session|appointment|meeting|visit|since|today|started|diagnosed|party|admitted|married|died|moved|next|until|by"
)

STREET_TYPES = (
    "Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Way|Place|Pl|Terrace|Square|Sq|Close|Crescent"
    "|Highway|Hwy|Parkway|Pkwy|Trail|Circle|Cir"
)
ADDRESS_STOPS = word_set(
    "step steps hour hours day days minute minutes week weeks month months year years second seconds point points mile"
    " miles percent way ways people times session sessions the a an and or of is was in"
)
"""Words that make "12 Step Way" or "24 Hour Drive" something else than a place."""

CREDENTIALS = r"(?:LCSW|LICSW|LMSW|LMFT|LPCC|LPC|LMHC|LCPC|LCMHC|LCDC|NCC|Psy\.?D\b|Ph\.?\s?D\b|Ed\.?D\b|M\.D\.|MD\b|MSW\b|M\.S\.W|RN\b)"
NAME_STOPS = word_set(
    "a also an and anonymous as at being but by call dead don't for from god he hi hello her here his how i i'm if important"
    " in irrelevant is it its just legion like may mine mud my no nobody none not nothing now of off on only or our out"
    " private right said secret she since so something still that the their then there they this to too unknown was we"
    " what when where which who why will with worthless would you your yours not-important monday tuesday wednesday"
    " thursday friday saturday sunday january february march april june july august september october november december"
    " thanks thank yes okay ok"
)
"""Words that are no name and end one."""
NAME_FIRST = word_set("april august june may will")
"""Of those, the ones that can still stand first in a name ("my name is Will")."""
