"""A small emotion lexicon of our own: joy, sadness, anger, fear, shame, calm.

Words a person uses of their own state in plain English. It counts mentions, it does not read irony or negation, so the
report always shows the coverage (share of words that any entry knows) beside the figures.
"""

from functools import cache

from mcp_control.techdeck.processing.words import WordTable

EMOTIONS = ("joy", "sadness", "anger", "fear", "shame", "calm")

_LEXICON = {
    "joy": """
        happy happier happiest happiness happily joy joyful glad gladly delighted delight cheerful cheer enjoy enjoyed
        enjoying enjoyable excited excitement exciting thrilled wonderful love loved loving loves laugh laughed laughing
        smile smiled smiling proud pride pleased pleasure grateful gratitude thankful hopeful hope fun amazing
        celebrate celebrated blessed optimistic content
    """,
    "sadness": """
        sad sadder saddest sadness sadly unhappy unhappiness depressed depressing depression miserable misery cry cried
        crying cries tear tears tearful grief grieve grieving grieved mourning mourn lonely loneliness alone heartbroken
        heartbreak hopeless hopelessness despair sorrow loss lost empty emptiness numb hurt hurts hurting gloomy
        disappointed disappointment miss missed missing
    """,
    "anger": """
        angry angrier anger angrily mad furious fury rage raging irritated irritating irritable irritation annoyed
        annoying annoyance frustrated frustrating frustration resent resentful resentment hate hated hates hating
        hatred bitter bitterness hostile hostility outraged outrage yell yelled yelling scream screamed screaming
        fight fights fighting argue argued arguing
    """,
    "fear": """
        afraid fear fears feared fearful scared scary scare terrified terrifying terror anxious anxiety anxieties worry
        worried worries worrying panic panicked panicking panicky nervous nervousness dread dreading frightened
        frightening frighten phobia phobias uneasy tense threatened threatening overwhelmed overwhelming insecure
        insecurity paranoid stress stressed stressful
    """,
    "shame": """
        ashamed shame shameful guilt guilty embarrassed embarrassing embarrassment humiliated humiliating humiliation
        worthless worthlessness inadequate inadequacy disgusted disgusting disgust regret regrets regretted regretful
        remorse failure failures failed stupid inferior judged blame blamed blaming unworthy unlovable
    """,
    "calm": """
        calm calmer calming calmly calmed relaxed relax relaxing relaxation peace peaceful peacefully serene serenity
        safe safer safety secure comfortable comfort comforted comforting soothing soothe soothed rest rested resting
        breathe breathing breath grounded grounding mindful mindfulness meditate meditation gentle gently ease eased
        settled balance balanced relief relieved
    """,
}


@cache
def lexicon() -> WordTable:
    """The lexicon as codes: the place of the emotion in `EMOTIONS`."""
    return WordTable({word: EMOTIONS.index(name) for name, words in _LEXICON.items() for word in words.split()})
