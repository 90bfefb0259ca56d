"""What a conversation with a person must say beside the model's replies: what this is not, and
where help is in danger.

`in_danger` is a coarse net and no judgement: it knows phrases, not people. It warns once too often
rather than once too rarely ("I burnt myself cooking"), and it will still miss what is said in other
words, so no warning never means no danger."""

import re

OPENING = """\
This is a research model for emotional-support conversation. It is a program, not a person and no
substitute for care: it can misread you and say the wrong thing. If you are in danger or think of
harming yourself, reach your local emergency services or a crisis line."""

CRISIS = """\
This sounds as if you or someone else may be in danger. Please reach your local emergency services
or a crisis line now, or go to someone near you who can stay with you. This program cannot help in
an emergency, whatever it says below."""

FEW = r"(?:\w+ ){0,6}?"  # at most six words between
STOP = r"(?= ?(?:[.,!?;]|$|now|all|any ?more|again))"  # a clause ends here
ME = (
    r"(?:my ?self|me|us|(?:my|the)"
    r" (?:kids?|child|children|son|daughter|baby|sister|brother|mum|mom|mother))"
)
THEM = (
    r"(?:(?:him|her|them|your)(?:sel(?:f|ves))?|you|(?:some|any|every)"
    r" ?(?:one|body)|people|others|my (?:kid|child|fam|wife|husband)\w*)"
)
NOT = r"(?:dont|do not|didnt|cant|cannot|can not|no longer|never|why would i)"

# Read after `in_danger` has made the text lower case, without apostrophes, with single blanks.
PHRASES = (
    # wanting to die
    r"sui?[cs]i?d(?:e|al)\w*|unalive\w*|(?<!\d)(?<!\d )kms",
    (
        r"(?:want\w*|wanna|wish|rather|ready|hope|need|deserve|plan\w*|better|easier"
        r"|tr(?:y|ied|ying))"
        rf" {FEW}(?:die|dead)"
    ),
    (
        r"(?:i|id|im|ill) (?:am |will |would |could |might |should |going |gonna |to |just |be"
        r" |better )*(?:die|dead)(?! (?:tired|serious))"
    ),
    (
        r"(?:feel\w*|felt|th(?:ink|ought)\w*|and) (?:about |of |like )+(?:my (?:own"
        r" )?)?(?:death|dying)|dying in (?:my|your) sleep"
    ),
    r"(?:end|ending|ended|tak(?:e|ing)|took) (?:my|his|her|their) (?:own )?li(?:fe|ves)",
    r"end(?:ing)? it all|(?:want|wanna) (?:to )?end it" + STOP,
    (
        rf"{NOT} (?:\w+ ){{0,2}}(?:want|wanna) (?:to )?(?:\w+ )?(?:be alive|be here|exist|wake"
        rf" up|live){STOP}"
    ),
    rf"(?:{NOT}|not|how to|if i can) {FEW}(?:go on|wake up){STOP}",
    (
        rf"(?:wish|want\w*|wanna|hope) {FEW}(?:never (?:been |be |was )?(?:born|wake"
        r" up)|(?:not|wasnt|werent) (?:be )?(?:alive|born))"
    ),
    (
        r"(?:reason|point|nothing)(?: left)? (?:to|in|for)(?: me to)? (?:liv(?:e|ing)|go"
        r" on|be(?:ing)? alive)|worth living"
    ),
    (
        r"(?:tired|sick|done) (?:of|with) (?:living|life|being alive)|better (?:off )?(?:if i"
        r" (?:was|were) gone|without me)"
    ),
    r"(?:want\w*|wanna|wish) (?:i |could |to |just ){1,3}(?:disappear|vanish)",
    # harming oneself
    (
        r"(?:kill|hang|shoot|drown|poison|starv|stab|hurt|harm|cut|burn|injur|off)"
        r"(?:e|s|t|ed|ing|ting)?"
        r" (?:on )?my ?sel(?:f|ves)"
    ),
    (
        r"self[- ]?(?:harm|injur|mutilat|abus)\w*|overdos\w*|od on|noose|(?:goodbye|farewell)"
        r" (?:letter|note)s?"
    ),
    r"(?:been |start\w* |kept |keep |am |im )cutting" + STOP,
    (
        r"(?:cut|cutting|slit|slitting|slash\w*) (?:up |open )?my (?:own"
        r" )?(?:wrist|arm|leg|thigh|skin|vein|throat|stomach)s?"
    ),
    r"(?:all|too many|bottle of|handful of|whole) (?:\w+ )?(?:pills|tablets|meds|medication)",
    (
        r"(?:jump|throw)\w* (?:myself )?(?:off|over|from|out|under|into|in front)"
        rf" {FEW}(?:bridge|building|roof\w*|window|train|cliff|traffic)"
    ),
    r"(?:gun|bullet|knife) (?:to|in|through) my (?:head|throat|mouth)|blow my (?:\w+ )?brains",
    # danger from others
    (
        r"(?<!\bit )(?<!really )(?:hit|beat|kick|slap|attack|threaten|stalk)(?:s|ed|ing|ting)?"
        rf" (?:up )?{ME}(?! (?:out|that|how)\b)"
    ),
    (
        r"(?:chok|punch|strangl|rap|molest|stab|abus|assault)(?:e|s|es|ed|ing)?"
        rf" {ME}|beat(?:s|ing|en)? (?:him|her|them|me|us) up|raped?"
    ),
    (
        r"(?:being|been|was|were|got|get) (?:\w+ )?(?:beaten|hit by"
        r" my|molested|strangled|assaulted|abused|stabbed|stalked)"
    ),
    (
        r"(?:will|might|could|going to|gonna|wants? to|tr(?:y|ies|ied|ying) to|threaten\w*(?:"
        rf" to)?) (?:kill|hurt|harm|shoot) {ME}(?! an?\b)"
    ),
    r"(?:physical\w*|sexual\w*|domestic) (?:abus|violen|assault)\w*",
    r"abusive (?:home|person|relationship|marriage|husband|wife|partner|boyfriend|father|mother)",
    (
        r"(?:not|isnt|arent|never|dont|doesnt|cant|no longer|nowhere) (?:\w+ ){0,2}safe|unsafe|in"
        r" danger(?! of)"
    ),
    (
        r"(?:fear\w*|afraid|scared|terrified|worried) for (?:my|our|his|her|their) (?:own"
        r" )?(?:life|lives|safety)"
    ),
    (
        r"(?:has|have|had|got|pulled|bought|grabbed|with) (?:an? |the |my |his |her )(?:loaded"
        r" )?(?:gun|knife|weapon|razor blade)s?"
    ),
    # harming others
    (
        r"(?:kill|murder|shoot|stab|strangle|poison|attack)(?:e|ed|ing)?"
        rf" {THEM}|homicid\w*|shoot(?:ing)? up"
    ),
    (
        r"(?<!dont )(?<!not )(?<!never"
        r" )(?:want|wanna|going|gonna|will|might|about|afraid|scared|plan|like)"
        rf" {FEW}(?:hurt|harm)(?:ing)? {THEM}"
    ),
)
DANGER = re.compile("|".join(rf"\b(?:{phrase})(?!\w)" for phrase in PHRASES))


def in_danger(text: str) -> bool:
    """Whether a message speaks of self-harm or danger, as far as phrases tell."""
    plain = re.sub(r"['’‘ʼ`´]", "", text.lower())
    return DANGER.search(" ".join(plain.split())) is not None
