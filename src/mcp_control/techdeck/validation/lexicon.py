"""The bias lexicon, in our own words: groups of people, generalising predicates, insults, and what excuses a sentence.

Everything is literal phrases, lower case; `bias` compiles them. Ambiguous adjectives ("black", "poor", "straight") name a
group only before a word for people or after "I am", so "black mood", "poor sleep" or "straight away" name nobody.
Contains offensive words: a text cannot be checked for them otherwise. English only.
Source: design of techdeck, section 4; wordings reviewed by hand, no external list copied.
"""

import re
from collections.abc import Iterable
from itertools import product

CATEGORIES = (
    "gender",
    "race_ethnicity",
    "age",
    "disability",
    "religion",
    "orientation",
    "socioeconomic",
    "geographic",
)

Groups = dict[str, tuple[tuple[str, str], ...]]
"""Phrase to the (category, group) pairs that it names."""


def _split(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split(",")]


_PLURAL_PEOPLE = _split(
    "people, persons, folks, men, women, guys, girls, boys, kids, children, families, communities, clients, "
    "patients, students, couples, parents, americans, teens, workers"
)
_SINGULAR_PEOPLE = _split(
    "person, man, woman, guy, girl, boy, kid, child, family, community, client, patient, student, "
    "couple, parent, american, teen, worker"
)
_PERSON_GROUPS = {
    "men": ("gender", "men"),
    "man": ("gender", "men"),
    "guys": ("gender", "men"),
    "guy": ("gender", "men"),
    "boys": ("gender", "men"),
    "boy": ("gender", "men"),
    "women": ("gender", "women"),
    "woman": ("gender", "women"),
    "girls": ("gender", "women"),
    "girl": ("gender", "women"),
    "teens": ("age", "teen"),
    "teen": ("age", "teen"),
}
_SELF = _split("i am, i'm, i’m, we are, we're, we’re, as a, as an, i am a, i am an, i'm a, i'm an, i’m a, i’m an")

_ADJECTIVES: dict[tuple[str, str], str] = {
    ("race_ethnicity", "black"): "black",
    ("race_ethnicity", "asian"): "asian",
    ("race_ethnicity", "white"): "white",
    ("race_ethnicity", "latino"): "latino, latina, hispanic",
    ("race_ethnicity", "roma"): "roma, romani",
    ("race_ethnicity", "indigenous"): "indigenous, native american, aboriginal",
    ("age", "older_adult"): "old, older, elderly",
    ("age", "young"): "young",
    ("disability", "blind"): "blind",
    ("disability", "deaf"): "deaf",
    ("disability", "autistic"): "autistic",
    ("disability", "disabled"): "disabled",
    ("disability", "diagnosis"): "mentally ill, depressed, bipolar, schizophrenic",
    ("religion", "muslim"): "muslim",
    ("religion", "jewish"): "jewish",
    ("religion", "christian"): "christian",
    ("religion", "hindu"): "hindu",
    ("religion", "atheist"): "atheist",
    ("orientation", "straight"): "straight, heterosexual",
    ("orientation", "gay"): "gay, homosexual",
    ("orientation", "lesbian"): "lesbian",
    ("orientation", "bi"): "bi, bisexual",
    ("gender", "trans"): "trans, transgender",
    ("gender", "nonbinary"): "nonbinary, non-binary",
    ("socioeconomic", "poor"): "poor, low-income, working-class, working class",
    ("socioeconomic", "rich"): "rich, wealthy",
    ("socioeconomic", "homeless"): "homeless",
    ("socioeconomic", "unemployed"): "unemployed, jobless",
    ("geographic", "rural"): "rural, small-town",
    ("geographic", "immigrant"): "immigrant, migrant, refugee, foreign",
    (
        "geographic",
        "nationality",
    ): "indian, mexican, chinese, african, american, russian, british, irish, polish, turkish, "
    "arab, pakistani, nigerian, german, french, italian, japanese, korean, filipino, brazilian",
}
_NOT_OF_SELF = {"old", "older", "young", "foreign", "rural", "depressed", "poor", "rich", "bi"}
"""Adjectives that say something else after "I am" ("I am old enough", "I am depressed", "I am poor at maths")."""

_SINGULAR: dict[tuple[str, str], str] = {
    ("gender", "women"): "woman, female, girl, lady",
    ("gender", "men"): "man, male, boy, guy",
    ("gender", "trans"): "transgender, transsexual",
    ("gender", "nonbinary"): "nonbinary, non-binary, genderqueer",
    ("race_ethnicity", "black"): "african american, african-american, person of color, person of colour",
    ("race_ethnicity", "asian"): "asian",
    ("race_ethnicity", "white"): "caucasian",
    ("race_ethnicity", "latino"): "latino, latina, latinx, hispanic",
    ("race_ethnicity", "indigenous"): "native american, indigenous, aboriginal",
    ("age", "teen"): "teen, teenager, adolescent, teenage",
    ("age", "older_adult"): "older adult, elderly, senior citizen, pensioner",
    ("disability", "deaf"): "deaf",
    ("disability", "autistic"): "autistic, autism",
    ("disability", "wheelchair"): "wheelchair user",
    ("disability", "disabled"): "disabled",
    (
        "disability",
        "diagnosis",
    ): "bipolar, schizophrenic, schizophrenia, ocd, ptsd, adhd, borderline personality, diagnosed with",
    ("religion", "muslim"): "muslim, islam, islamic",
    ("religion", "jewish"): "jewish, jew, judaism",
    ("religion", "christian"): "christian, catholic, protestant, mormon, christianity",
    ("religion", "hindu"): "hindu, hinduism",
    ("religion", "atheist"): "atheist, agnostic",
    ("orientation", "gay"): "gay, homosexual",
    ("orientation", "lesbian"): "lesbian",
    ("orientation", "bi"): "bisexual",
    ("orientation", "straight"): "heterosexual",
    ("socioeconomic", "homeless"): "homeless",
    ("socioeconomic", "unemployed"): "unemployed, jobless",
    ("socioeconomic", "rich"): "millionaire",
    ("geographic", "immigrant"): "immigrant, migrant, refugee, asylum seeker, foreigner",
    ("geographic", "rural"): "country folk",
}
_PLURAL: dict[tuple[str, str], str] = {
    ("gender", "women"): "women, females, girls, ladies",
    ("gender", "men"): "men, males, boys, guys",
    ("gender", "trans"): "transgenders, transsexuals",
    ("race_ethnicity", "black"): "blacks, african americans, people of color, people of colour",
    ("race_ethnicity", "asian"): "asians",
    ("race_ethnicity", "white"): "whites, caucasians",
    ("race_ethnicity", "latino"): "latinos, latinas, hispanics",
    ("race_ethnicity", "roma"): "roma people, romanies, gypsies",
    ("race_ethnicity", "indigenous"): "native americans, aboriginals",
    ("age", "teen"): "teens, teenagers, adolescents",
    ("age", "older_adult"): "older adults, the elderly, senior citizens, pensioners, boomers, old folks",
    ("age", "young"): "millennials, the young",
    ("disability", "deaf"): "the deaf",
    ("disability", "blind"): "the blind",
    ("disability", "autistic"): "autistics, people with autism",
    ("disability", "wheelchair"): "wheelchair users",
    ("disability", "disabled"): "the disabled, people with disabilities",
    ("disability", "diagnosis"): "the mentally ill, schizophrenics, people with depression, people with bipolar, "
    "people with schizophrenia, people with mental illness, addicts",
    ("religion", "muslim"): "muslims",
    ("religion", "jewish"): "jews",
    ("religion", "christian"): "christians, catholics, protestants, mormons",
    ("religion", "hindu"): "hindus",
    ("religion", "atheist"): "atheists",
    ("orientation", "gay"): "gays, homosexuals",
    ("orientation", "lesbian"): "lesbians",
    ("orientation", "bi"): "bisexuals",
    ("orientation", "straight"): "heterosexuals",
    ("socioeconomic", "poor"): "the poor, people on welfare, people on benefits",
    ("socioeconomic", "rich"): "the rich, millionaires",
    ("socioeconomic", "homeless"): "the homeless",
    ("socioeconomic", "unemployed"): "the unemployed",
    ("geographic", "immigrant"): "immigrants, migrants, refugees, asylum seekers, foreigners",
    ("geographic", "rural"): "villagers, country people, rural folk",
    (
        "geographic",
        "nationality",
    ): "indians, mexicans, africans, americans, russians, arabs, pakistanis, nigerians, germans, "
    "italians, koreans, brazilians, turks, poles",
}


def any_of(phrases: Iterable[str]) -> str:
    """Regex alternation of literal phrases, the longest first, valid in Python and in Rust."""
    return "|".join(
        re.escape(phrase).replace("\\ ", " ") for phrase in sorted(set(phrases), key=lambda p: (-len(p), p))
    )


def _with_people(people: list[str]) -> Groups:
    found: Groups = {}
    for group, adjectives in _ADJECTIVES.items():
        for adjective, person in product(_split(adjectives), people):
            other = _PERSON_GROUPS.get(person)
            found[f"{adjective} {person}"] = (group,) if other is None else (group, other)
    return found


def _listed(table: dict[tuple[str, str], str]) -> Groups:
    return {phrase: (group,) for group, phrases in table.items() for phrase in _split(phrases)}


def _of_self() -> Groups:
    found: Groups = {}
    for group, adjectives in _ADJECTIVES.items():
        for adjective in _split(adjectives):
            if adjective not in _NOT_OF_SELF:
                found |= {f"{start} {adjective}": (group,) for start in _SELF}
    return found


PLURALS: Groups = _with_people(_PLURAL_PEOPLE) | _listed(_PLURAL)
"""Phrases that speak of a group as a whole: the subjects of a generalisation."""
MENTIONS: Groups = PLURALS | _with_people(_SINGULAR_PEOPLE) | _of_self() | _listed(_SINGULAR)
"""Every phrase that counts as a mention of a group."""
_ANY_ADJECTIVE = any_of(adjective for listed in _ADJECTIVES.values() for adjective in _split(listed))
_ANY_OF_SELF = any_of(
    adjective for listed in _ADJECTIVES.values() for adjective in _split(listed) if adjective not in _NOT_OF_SELF
)
PLURAL_PATTERN = rf"(?:{_ANY_ADJECTIVE}) (?:{any_of(_PLURAL_PEOPLE)})|{any_of(_listed(_PLURAL))}"
MENTION_PATTERN = (
    rf"(?:{_ANY_ADJECTIVE}) (?:{any_of(_PLURAL_PEOPLE + _SINGULAR_PEOPLE)})|(?:{any_of(_SELF)}) (?:{_ANY_OF_SELF})"
    rf"|{any_of([*_listed(_PLURAL), *_listed(_SINGULAR)])}"
)
"""What matches one of `PLURALS` or `MENTIONS`, factored: thousands of alternatives would be slow."""
GROUPS: dict[str, tuple[str, ...]] = {
    category: tuple(sorted({group for pairs in MENTIONS.values() for found, group in pairs if found == category}))
    for category in CATEGORIES
}

MASKED = _split(
    "depression, depressed, anxiety, anxious, panic, trauma, traumatic, disorder, illness, ill, disease, addiction, addict, "
    "addicts, abuse, suicidal, suicide, grief, stress, stressed, bipolar, schizophrenia, ocd, ptsd, adhd, autism, disability"
)
"""Words of diagnosis: taken out, like the mention itself, before a sentence's regard is measured."""

ATTRIBUTES = _split(
    "nurse, doctor, secretary, engineer, boss, manager, leader, teacher, cleaner, maid, driver, scientist, lawyer, soldier, "
    "victim, criminal, caregiver, breadwinner, homemaker, housewife, student, expert"
)
"""Roles whose co-occurrence with a group is counted."""

ADVERBS = _split(
    "just, all, always, so, too, very, really, naturally, inherently, innately, simply, basically, usually, mostly, often, "
    "only, such, nothing but, a bunch of, by nature, genetically, biologically, obviously, clearly, generally, more, less, "
    "pretty, quite, far, way, a, born, the, plain, kind of, mentally, morally, total, completely"
)
ESSENCE = _split("naturally, inherently, innately, genetically, biologically, by nature, by their nature, born to be")
INSULTS = _split(
    "lazy, stupid, dumb, idiots, idiotic, ignorant, emotional, hysterical, irrational, illogical, weak, inferior, dirty, "
    "filthy, smelly, criminals, criminal, violent, dangerous, liars, dishonest, greedy, stingy, thieves, terrorists, "
    "extremists, fanatics, backward, backwards, primitive, savages, uncivilized, uncivilised, animals, parasites, leeches, "
    "freeloaders, moochers, vermin, immoral, sinful, perverts, perverted, unnatural, abnormal, disgusting, promiscuous, "
    "predators, pedophiles, paedophiles, untrustworthy, manipulative, gold diggers, nags, crazy, insane, psychos, useless, "
    "worthless, burdens, burden, incompetent, incapable, unreliable, selfish, entitled, spoiled, irresponsible, reckless, "
    "clueless, senile, snowflakes, uneducated, trash, scum, cold-hearted, heartless, arrogant, snobs, evil, godless, "
    "brainwashed, aggressive, thugs, uncontrollable, bad drivers, bad parents, bad at math, bad at maths, bad mothers, "
    "bad with money, sissies, attention seekers, drama queens, invaders, cheaters, cheap, going through a phase, "
    "to blame, cowards, losers, inhuman, subhuman, unfit, sex-crazed, submissive, gullible, simple-minded, "
    "slow-witted, rude, ungrateful, hateful, not real women, not real men"
)
ALWAYS_DO = _split(
    "lie, steal, cheat, complain, exaggerate, manipulate, overreact, whine, nag, scam, leech, sponge, gossip, fake it, "
    "make trouble, cause trouble, cause problems, play the victim, want handouts, want attention, want free stuff, "
    "use people, hurt people, break the law, commit crimes, take advantage, take our jobs, ruin everything, start fights, "
    "blame others, bring crime, abuse the system, live off welfare, live off others, think with their emotions, care about money, "
    "care about themselves, think about sex, think about money, want sex, do drugs"
)
NEVER_DO = _split(
    "be trusted, think straight, think rationally, think logically, think clearly, lead, control themselves, "
    "control their emotions, control their tempers, control their anger, be good parents, be faithful, commit, raise children, "
    "raise kids, do math, do maths, do science, want to work, work hard, care about others, care about anyone, contribute, "
    "deserve, belong, feel empathy, feel love, feel emotions, have feelings, have emotions, have morals, have empathy, "
    "understand love, understand feelings, understand logic, pay taxes, integrate, fit in, know better, know how to behave, "
    "tell the truth, learn, change, keep a job, hold a job, handle stress, handle pressure, handle money, handle power, "
    "make decisions, be leaders, be allowed, have children, be taken seriously, teach children, adopt, be real women, "
    "be real men, love properly, be normal, respect women, follow rules, listen to reason"
)
LACKS = _split(
    "empathy, intelligence, discipline, morals, morality, ambition, self-control, feelings, emotions, shame, manners, "
    "loyalty, logic, work ethic, common sense, values, a soul, character, integrity, willpower"
)
PLACES = _split(
    "belong in the kitchen, belong at home, belong in prison, belong in jail, belong in institutions, belong locked up, "
    "should stay in the kitchen, should go back, should be deported, "
    "should be locked up, should be sent back, should know their place, should shut up, should be sterilized, "
    "should be banned, should be grateful, should get over it, should snap out of it, are ruining, are taking over, "
    "are invading, are destroying, are stealing, are taking our, ruin, have no place, don't belong, do not belong, "
    "are not real women, are not real men, aren't real women, aren't real men, are not normal, aren't normal, "
    "are not human, are not smart enough, aren't smart enough, are not fit to, aren't fit to, are not capable, "
    "are not as smart, aren't as smart, are going to hell, choose to be poor, deserve to be poor, deserve it"
)
SINGULAR_SAYINGS: Groups = {
    "a woman's place is": (("gender", "women"),),
    "a woman belongs in the kitchen": (("gender", "women"),),
    "a woman should obey": (("gender", "women"),),
    "a real man doesn't cry": (("gender", "men"),),
    "real men don't cry": (("gender", "men"),),
    "go back to your country": (("geographic", "immigrant"),),
    "go back to where you came from": (("geographic", "immigrant"),),
    "gay is a choice": (("orientation", "gay"),),
    "being gay is a choice": (("orientation", "gay"),),
    "being gay is a sin": (("orientation", "gay"),),
    "being gay is unnatural": (("orientation", "gay"),),
}
LIKE_YOU_DO = _split(
    "should, should not, shouldn't, can't, cannot, always, never, are all, are just, don't deserve, don't belong"
)

SLURS: Groups = {
    phrase: ((category, "slur"),)
    for category, phrases in {
        "gender": "tranny, trannies, shemale, shemales, feminazi, feminazis",
        "race_ethnicity": "nigger, niggers, gook, gooks, spics, wetback, wetbacks, beaner, beaners, raghead, ragheads, "
        "towelhead, towelheads, darkie, darkies, redskins, pikey, pikeys, jigaboo",
        "age": "old hag, old hags, old fart, old farts, ok boomer",
        "disability": "retard, retards, retarded, mongoloid, mongoloids, spaz, cripples",
        "religion": "kike, kikes, mudslime, mudslimes, christ-killer, christ-killers",
        "orientation": "faggot, faggots, fags, sodomite, sodomites, lesbo, lesbos",
        "socioeconomic": "white trash, trailer trash, welfare queen, welfare queens, gutter trash",
        "geographic": "anchor baby, anchor babies, third-worlder, third-worlders, illegals",
    }.items()
    for phrase in _split(phrases)
}
"""Words that insult a group whatever the sentence says. Reclaimed or ambiguous ones are left out."""

REPORTING = _split(
    "said, says, saying, say, told, tells, telling, called, calls, calling, call, thought, thinks, think, believed, believes, "
    "believe, claimed, claims, claim, heard, hear, yelled, shouted, wrote, posted, commented, joked, insisted, insists, "
    "argued, argues, taught, raised to believe, assumes, assumed, assume, accused, according to, quote, people say, "
    "some say, message was, comments about, used to"
)
OWN_OPINION = _split("think, thought, believe, believed, say, said, claim, call, assume, assumed")
"""Reporting verbs that report nobody else when their subject is "I"."""
CHALLENGE = _split(
    "not true, isn't true, untrue, false, myth, myths, stereotype, stereotypes, stereotyping, stigma, wrong, unfair, harmful, "
    "hurtful, prejudice, prejudiced, bias, biased, racist, racism, sexist, sexism, homophobic, homophobia, transphobic, "
    "ableist, ageist, xenophobic, antisemitic, islamophobic, offensive, bigoted, bigotry, misconception, misconceptions, "
    "disagree, doesn't mean, does not mean, don't mean, do not mean, not all, not every, no one should, nobody should, "
    "never say, don't believe, do not believe, don't think, do not think, not because, as if, rather than, no evidence, "
    "slur, insult, insulting, derogatory, the idea that, the belief that, the notion that, the assumption that, whether, "
    "refuse to believe, no reason to, it hurt, it hurts, discrimination, discriminate"
)
