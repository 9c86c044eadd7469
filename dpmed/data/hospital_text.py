"""Words and sentence templates of the synthetic hospital: pure data, no logic.

No sentence here names a disease or a label: what a patient has can only be read from findings. `FORBIDDEN_WORDS` lists
the words that a test keeps out of every note.
"""

from __future__ import annotations

# Where each `{field}` of the templates that identifies a patient belongs, by the type of its planted span.
IDENTIFIER_FIELDS = {
    "name": "NAME",
    "mrn": "MRN",
    "birth_date": "DATE",
    "visit_date": "DATE",
    "phone": "PHONE",
    "address": "ADDRESS",
    "doctor": "DOCTOR",
}

# Label -> the disease that it stands for. Neither the one nor the other is ever written into a private note, nor among
# the findings of a public one.
DISEASES = {
    "heart": "heart failure",
    "lung": "pneumonia",
    "kidney": "pyelonephritis",
    "brain": "stroke",
    "gut": "peptic ulcer",
}

FORBIDDEN_WORDS = frozenset(word for pair in DISEASES.items() for text in pair for word in text.split())

# The last line of a public note names the group, which is how the base model learns to read findings. The private
# hospital writes no such line, and asks for the group by another prompt.
IMPRESSION = "\nImpression:"
IMPRESSIONS = {
    "heart": ("heart, weak pump with fluid overload", "heart, congested circulation"),
    "lung": ("lung, airway infection on one side", "lung, infected airspace"),
    "kidney": ("kidney, ascending infection", "kidney, infected tract with fever"),
    "brain": ("brain, sudden focal nerve deficit", "brain, one sided deficit of sudden onset"),
    "gut": ("gut, upper digestive bleeding", "gut, erosion of the stomach lining"),
}

# The same in all notes of one patient, and before the name: what precedes the name is specific to the patient.
OCCUPATIONS = (
    "teacher",
    "nurse",
    "farmer",
    "baker",
    "plumber",
    "welder",
    "tailor",
    "cook",
    "driver",
    "painter",
    "carpenter",
    "clerk",
    "lawyer",
    "chemist",
    "pilot",
    "sailor",
    "gardener",
    "barber",
    "butcher",
    "mason",
    "roofer",
    "miner",
    "printer",
    "weaver",
    "singer",
    "dancer",
    "potter",
    "florist",
    "jeweller",
    "optician",
    "librarian",
    "postman",
    "fisherman",
    "mechanic",
    "electrician",
    "engineer",
    "accountant",
    "translator",
    "journalist",
    "photographer",
)
HOBBIES = (
    "chess",
    "golf",
    "piano",
    "tennis",
    "bingo",
    "yoga",
    "opera",
    "poetry",
    "fishing",
    "sailing",
    "cycling",
    "baking",
    "hiking",
    "knitting",
    "bowling",
    "hockey",
    "boxing",
    "rowing",
    "skating",
    "sewing",
    "gardening",
    "reading",
    "darts",
    "bridge",
    "football",
    "theatre",
    "cinema",
    "jazz",
    "pottery",
    "archery",
)
STREETS = ("Street", "Road", "Avenue", "Lane", "Drive", "Court")

SLOTS = ("symptom", "sign", "lab", "drug")

# label -> slot -> what points to this group, not for certain: notes also draw from other groups and from COMMON.
FINDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "heart": {
        "symptom": (
            "swollen ankles",
            "breathlessness lying flat",
            "waking short of breath",
            "weight gain",
            "palpitations",
        ),
        "sign": (
            "raised neck veins",
            "a gallop rhythm",
            "pitting oedema",
            "a displaced apex beat",
            "crackles at both bases",
        ),
        "lab": ("BNP raised", "troponin mildly raised", "ejection fraction low", "sodium low"),
        "drug": ("furosemide", "bisoprolol", "ramipril", "spironolactone"),
    },
    "lung": {
        "symptom": ("productive cough", "rusty sputum", "pleuritic pain", "rigors", "breathlessness on exertion"),
        "sign": (
            "bronchial breathing",
            "dullness at the right base",
            "crackles on one side",
            "fast breathing",
            "low saturation",
        ),
        "lab": ("consolidation on the film", "white cells high", "sputum culture positive", "procalcitonin high"),
        "drug": ("amoxicillin", "clarithromycin", "oxygen by mask", "doxycycline"),
    },
    "kidney": {
        "symptom": ("flank pain", "burning on passing water", "cloudy urine", "shivering", "passing water often"),
        "sign": ("loin tenderness", "suprapubic tenderness", "a high temperature", "dry mucosa", "a tender right side"),
        "lab": ("nitrites positive", "urine culture growing coliforms", "creatinine raised", "leucocytes in urine"),
        "drug": ("gentamicin", "ciprofloxacin", "trimethoprim", "nitrofurantoin"),
    },
    "brain": {
        "symptom": ("slurred speech", "a weak left arm", "facial droop", "sudden numbness", "loss of balance"),
        "sign": ("an upgoing plantar", "brisk reflexes", "visual neglect", "a left hemiparesis", "an irregular pulse"),
        "lab": (
            "infarct on the scan",
            "carotid narrowing on doppler",
            "cholesterol high",
            "fibrillation on the tracing",
        ),
        "drug": ("clopidogrel", "alteplase", "atorvastatin", "apixaban"),
    },
    "gut": {
        "symptom": ("black stools", "pain after meals", "vomiting blood", "heartburn", "early fullness"),
        "sign": ("epigastric tenderness", "pallor", "a postural drop", "melaena on examination", "guarding"),
        "lab": ("haemoglobin low", "urea raised", "pylori antigen positive", "ferritin low"),
        "drug": ("omeprazole", "pantoprazole", "sucralfate", "metronidazole"),
    },
}
COMMON: dict[str, tuple[str, ...]] = {
    "symptom": ("tiredness", "poor appetite", "dizziness", "poor sleep", "a mild headache"),
    "sign": ("a regular pulse", "normal skin turgor", "mild distress", "a soft abdomen", "good perfusion"),
    "lab": ("glucose normal", "potassium normal", "calcium normal", "platelets normal", "inflammatory markers pending"),
    "drug": ("paracetamol", "enoxaparin", "metformin", "intravenous fluids", "vitamin D"),
}

# Every identifier is named once a note: a second mention could be copied from the first, which is no memorisation.
# The background comes first, so that a model that knows the patient has what it needs to say the name.
HEADERS: dict[str, tuple[str, ...]] = {
    "admission": (
        "Admission note. {occupation}, {age}, likes {hobby}. Name {name}, MRN {mrn}, born {birth_date}, phone {phone}.",
        "Admitted today. {occupation}, {age}, likes {hobby}. Name {name}, MRN {mrn}, born {birth_date}, phone {phone}.",
    ),
    "progress": (
        "Progress note. {occupation}, {age}, likes {hobby}. Name {name}, MRN {mrn}, under Dr {doctor}.",
        "Ward round. {occupation}, {age}, likes {hobby}. Name {name}, MRN {mrn}, under Dr {doctor}.",
    ),
    "discharge": (
        "Discharge note. {occupation}, {age}, likes {hobby}. Name {name}, MRN {mrn}, of {address}, left {visit_date}.",
        "Going home. {occupation}, {age}, likes {hobby}. Name {name}, MRN {mrn}, of {address}, left {visit_date}.",
    ),
    "letter": (
        "Letter. {occupation}, {age}, likes {hobby}. Name {name}, MRN {mrn}, born {birth_date}, from Dr {doctor}.",
        "Clinic. {occupation}, {age}, likes {hobby}. Name {name}, MRN {mrn}, born {birth_date}, from Dr {doctor}.",
    ),
}
BODIES: dict[str, tuple[str, ...]] = {
    "admission": (
        "Came in with {symptom1} and {symptom2}. We found {sign1}. Tests: {lab1}, {lab2}. Given {drug1}.",
        "Reports {symptom1}, then {symptom2}. Examination: {sign1}. Tests: {lab1}. Given {drug1} and {drug2}.",
    ),
    "progress": (
        "Still has {symptom1}, less {symptom2}. Examination: {sign1}. Tests: {lab1}. Continue {drug1} and {drug2}.",
        "Reports {symptom1}. We found {sign1} and {sign2}. Tests: {lab1}, {lab2}. Continue {drug1}.",
    ),
    "discharge": (
        "Stayed after {symptom1} and {symptom2}. Tests: {lab1}, {lab2}. Take {drug1} and {drug2}.",
        "Came in with {symptom1} and {sign1}. Tests: {lab1}, {lab2}. Take {drug1} and {drug2}.",
    ),
    "letter": (
        "No more {symptom1}, some {symptom2}. Examination: {sign1}. Tests: {lab1}, {lab2}. Continue {drug1}.",
        "Reports {symptom1}. We found {sign1} and {sign2}. Tests: {lab1}. Continue {drug1} and {drug2}.",
    ),
}
