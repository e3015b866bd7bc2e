"""Every number by which the checkup calls something a finding, with its source, or the measurement behind it.

"Measured" is on two corpora: `tickets`, the 464 rows of jobs/recipes/data, and `descriptions`, the 886 324 one-line
descriptions of the packages of PyPI, which people wrote, in many languages.
"""

from __future__ import annotations

# --- how many rows are needed, by what they hold ---------------------------------------------------------------------
# OpenAI's guide to supervised fine-tuning: "clear improvements from fine-tuning on 50 to 100 training examples".
MIN_ROWS = 50
# A class with fewer rows is not learnt without tricks: 8 a class is where SetFit begins, arXiv:2209.11055 section 4.
MIN_ROWS_OF_A_CLASS = 8
# The largest class over the smallest one. Google's machine learning course calls a class with less than 20 % of the rows
# moderately and one with less than 1 % extremely out of balance; between two classes, 10 is 9 %.
MAX_IMBALANCE = 10.0
# What is taken for classes where rows have no labels: answers as short as this, no more kinds of them, each given often.
CLASS_CHARS = 50
MAX_CLASSES = 100
MIN_ROWS_PER_CLASS = 10
CLASS_ANSWERS = 0.95  # share of the rows with such an answer

# --- what is the same ------------------------------------------------------------------------------------------------
# Shingles of 5 characters: Mining of Massive Datasets, section 3.2.2, "for e-mails"; rows of fine-tuning are as short.
SHINGLE_CHARS = 5
# Jaccard similarity from which two rows are near duplicates. Of tickets, which are made from templates, no two rows
# reach 0.75, with one slot of a template filled differently. A word changed in 20 gives 0.83, in 30 0.88.
NEAR = 0.85
# Hashes of a row and the bands they are cut into: rows at 0.85 meet in a band with a probability of 0.994, at 0.9 of
# 0.9999, at 0.5 of 0.06 (Mining of Massive Datasets, section 3.4.2). FineWeb takes 112 in 14, arXiv:2406.17557.
NUM_PERM = 128
NUM_BANDS = 16
# Rows looked at for it: 3.7 kB each (measured), so 185 MB.
NEAR_ROWS = 50_000
# Characters of a row looked at for it, and how different the lengths of two near duplicates may be.
NEAR_CHARS = 4000

# --- lengths ---------------------------------------------------------------------------------------------------------
# Distance from the median of the logarithms, in robust standard deviations (1.4826 times the median absolute deviation,
# Iglewicz and Hoaglin 1993). They advise 3.5, which is one row in 2000 of a log-normal corpus; 6 is one in 5 * 10^8.
OUTLIER_DEVIATIONS = 6.0
MAD_TO_DEVIATION = 1.4826
# ... and the factor from the median, for corpora whose rows are all of nearly one length.
OUTLIER_FACTOR = 8.0
MIN_ROWS_FOR_OUTLIERS = 50

# --- languages -------------------------------------------------------------------------------------------------------
# Of 9,000 descriptions drawn at random, both together find 66 in another language than English, and all 66 are; a
# confidence of 0.5 and 20 letters find 207, of which nine are English. Letters are counted in bytes of UTF-8, so that 20
# Chinese ones are enough.
LANGUAGE_CONFIDENCE = 0.7
LANGUAGE_LETTER_BYTES = 60
# A corpus is in one language when so many of its rows are; then the others are findings. Below, it is a mixed corpus.
ONE_LANGUAGE = 0.9
# ... but not those that a naive Bayes classifier takes for each other.
CLOSE_LANGUAGES = (
    frozenset(("da", "nb", "nn", "no")),
    frozenset(("bs", "hr", "sr")),
    frozenset(("id", "ms")),
    frozenset(("cs", "sk")),
    frozenset(("en", "pcm")),
    frozenset(("zh", "yue", "wuu")),
)
# It costs more than all else about a row: the first rows are all looked at, of the others one in twenty, and of each so
# many characters.
LANGUAGE_ROWS = 2_000
LANGUAGE_EVERY = 20
LANGUAGE_CHARS = 300

# --- the card --------------------------------------------------------------------------------------------------------
ROWS_NAMED = 10
HISTOGRAM_BINS = 10
MAX_KINDS_OF_PROBLEMS = 20
