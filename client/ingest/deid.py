"""De-identification of DICOM objects: PS3.15 Annex E, Basic Profile and a site's options.

``deidentify`` turns what was read into what may be stored, or into the reason why nothing may.
``plan_changes`` says what it would do, and never shows a value.

Guarantees:
    An attribute that neither table E.1-1 nor the list of what may stay names is removed, at every
    depth; so are private attributes, curves, overlays, the preamble and what follows the data set.
    No free text is kept: of what may stay, only words the profile knows, numbers and known codes.
    UIDs are replaced consistently, in the file meta information and in every reference.
    Dates of one patient move by the same number of days; of another patient by another.
    A class that cannot be cleaned, pixels that seem to hold text and pixels that cannot be read are
    refused, and so is what was de-identified here before.
    The argument is left as it was.

Not covered: what a number means. A patient's height written as a slice thickness would stay; so
would text coded in pixel values, and a face in a head scan.

References:
    DICOM PS3.15 2026c Annex E; PS3.16 CID 7050; PS3.5 6.2 (value representations).
"""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from functools import cache
from typing import Literal, NamedTuple

from pydicom import DataElement, Dataset, config
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_sequence
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag

from client.ingest import pixels
from client.ingest.elements import (
    ACTS,
    NOTHING,
    Apply,
    Element,
    Item,
    Job,
    Note,
    as_dataset,
    bytes_of,
    first,
    put,
    several,
    tag_of,
    text_of,
    with_bytes,
)
from client.ingest.items import bytes_of_items, items_of
from client.ingest.keys import Key
from client.ingest.profile import EDITION, Act, Rule, Terms, code_meanings, profile_for

METHOD = f"Consilia, {EDITION} E"
IMPLEMENTATION = "2.25.302868394216873523614290386195438861401"
#: CID 7050; the meaning of a code is always the standard's.
OPTIONS = {
    "113100": "Basic Application Confidentiality Profile",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
    "113109": "Retain Device Identity Option",
}
METHODS = OPTIONS | {
    "113101": "Clean Pixel Data Option",
    "113102": "Clean Recognizable Visual Features Option",
    "113103": "Clean Graphics Option",
    "113104": "Clean Structured Content Option",
    "113105": "Clean Descriptors Option",
    "113106": "Retain Longitudinal Temporal Information Full Dates Option",
    "113110": "Retain UIDs Option",
    "113111": "Retain Safe Private Option",
    "113112": "Retain Institution Identity Option",
}
VIDEO = ("1.2.840.10008.1.2.4.10", "1.2.840.10008.1.2.7.")  # MPEG, H.264, H.265; SMPTE streams
PIXELS = tag_of("PixelData")
CODES = [tag_of(keyword) for keyword in ("CodeValue", "LongCodeValue", "URNCodeValue")]
#: Written anew, whatever was there.
REWRITTEN = frozenset(
    tag_of(keyword)
    for keyword in (
        "PixelData",
        "CodeValue",
        "CodingSchemeDesignator",
        "CodeMeaning",
        "PatientIdentityRemoved",
        "DeidentificationMethod",
        "DeidentificationMethodCodeSequence",
        "LongitudinalTemporalInformationModified",
    )
)

Reason = Literal[
    "already-done",  # de-identified here before
    "burned-in",  # header or pixels say that there is text in the pixels
    "no-identity",  # neither a patient nor a study to call by a pseudonym
    "no-pixels",  # nothing to learn from, or fewer pixels than the header says
    "no-decoder",  # pixels that nothing installed can decode, so nobody has looked at them
    "object-class",  # a class that cannot be cleaned attribute by attribute
    "transfer-syntax",  # an encoding that cannot be looked into
    "unreadable",  # a value that the standard does not allow, where one is needed
]


class Refused(NamedTuple):
    """Nothing may be stored of this object; ``reason`` is safe to write anywhere."""

    reason: Reason


class Change(NamedTuple):
    """What happens to an attribute: where it stands, its keyword, what is done; never a value."""

    where: str
    keyword: str
    action: str


def deidentify(dataset: Dataset, terms: Terms, key: Key) -> Dataset | Refused:
    """Return a new data set, with file meta information, that holds no identifier of ``dataset``.

    Pixels and other kept values are shared with the argument, not copied. It is whole: to be
    written with ``dcmwrite``, in the transfer syntax it came in.

    Args:
        dataset: As read with ``dcmread``, pixels included.
        terms: What the site decided.
        key: The site's own.
    """
    return _quietly(dataset, terms, key, None)


def plan_changes(dataset: Dataset, terms: Terms, key: Key) -> list[Change] | Refused:
    """Return what ``deidentify`` would do, by attribute; what is only kept is left out."""
    changes: dict[str, Change] = {}  # by place: the last thing that happens to it is what shows

    def note(where: str, keyword: str, action: str) -> None:
        changes[where] = Change(where, keyword, action)

    found = _quietly(dataset, terms, key, note)
    return found if isinstance(found, Refused) else list(changes.values())


def identity_of(dataset: Dataset) -> str:
    """Return what tells this patient from others at the site, empty if nothing does.

    It is the PatientID; where there is none, name and birth date; where there are none, the study.
    The issuer is left out: two patients taken for one are still one unit of privacy, one patient
    taken for two would be on both sides of a split.
    """
    patient = first(dataset, "PatientID")
    if patient:
        return patient
    name, birth = first(dataset, "PatientName"), first(dataset, "PatientBirthDate")
    if name and birth:
        return f"PatientName={name} PatientBirthDate={birth}"
    study = first(dataset, "StudyInstanceUID")
    return f"StudyInstanceUID={study}" if study else ""


def _quietly(dataset: Dataset, terms: Terms, key: Key, note: Note | None) -> Dataset | Refused:
    """De-identify without a warning or an error: pydicom's show the values they complain about."""
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        try:
            return _deidentified(dataset, terms, key, note)
        except pixels.NoDecoder:
            return Refused("no-decoder")
        except Exception:  # of a value that nobody understands, nothing may be said or kept
            return Refused("unreadable")


def _deidentified(dataset: Dataset, terms: Terms, key: Key, note: Note | None) -> Dataset | Refused:
    reason = _objection(dataset, terms)
    if reason:
        return Refused(reason)
    job = _job(dataset, terms, key, note)
    picture = _picture(dataset, job)
    if picture is None:
        return Refused("no-pixels")
    kept = _cleaned(dataset, job, "")
    kept[PIXELS] = picture
    _sign(kept, dataset, terms, job)
    cleaned = as_dataset(kept, job)
    cleaned.file_meta = _meta(dataset, kept, job)
    cleaned.preamble = bytes(128)
    return cleaned


def _objection(dataset: Dataset, terms: Terms) -> Reason | None:
    """Return why nothing may be stored of this object, None if there is no reason."""
    profile = profile_for(terms)
    if first(dataset, "SOPClassUID") not in profile.images | profile.lettered:
        return "object-class"
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_private or not syntax.is_transfer_syntax or syntax.startswith(VIDEO):
        return "transfer-syntax"
    if first(dataset, "DeidentificationMethod").startswith(METHOD):
        return "already-done"
    if not identity_of(dataset):
        return "no-identity"
    if PIXELS not in dataset or not bytes_of(dataset.get_item(PIXELS)):
        return "no-pixels"
    if pixels.is_cleared(dataset, terms):
        return None
    if pixels.announces_text(dataset, profile) or pixels.shows_text(dataset):
        return "burned-in"
    return None


def _job(dataset: Dataset, terms: Terms, key: Key, note: Note | None) -> Job:
    syntax = dataset.file_meta.TransferSyntaxUID
    patient = identity_of(dataset)
    return Job(
        acts=_acts(terms),
        words=profile_for(terms).words,
        key=key,
        patient=patient,
        days=key.days(patient),
        keep_times=terms.keep_times,
        traces=_traces(dataset, terms) if terms.retain_device else frozenset(),
        implicit=syntax.is_implicit_VR,
        little=syntax.is_little_endian,
        note=note,
        made={},
    )


@cache
def _acts(terms: Terms) -> dict[int, tuple[Apply | None, Rule]]:
    """Return the function of each rule by tag; None where more than the element is needed."""
    return {tag: (ACTS.get(rule.act), rule) for tag, rule in profile_for(terms).rules.items()}


def _traces(dataset: Dataset, terms: Terms) -> frozenset[str]:
    """Return the words of this object's names and numbers, in capitals."""
    telling = profile_for(terms).telling
    found = " ".join(text_of(dataset[tag]) for tag in telling if tag in dataset).upper()
    return frozenset(word for word in re.split(r"[\W_]+", found) if len(word) > 2)


def _cleaned(source: Dataset | Item, job: Job, where: str) -> Item:
    """Return what may stay of ``source``, changed as its rules ask, sequences included."""
    kept: Item = {}
    acts, note = job.acts, job.note
    for tag, element in source.items():
        act, rule = acts.get(int(tag), NOTHING)
        if act is not None:
            vr = element.VR
            is_fit = vr in rule.vrs or (vr is None and job.implicit)
            new = act(element, rule, job) if is_fit else None
        elif rule.act is Act.SEQUENCE:
            new = _sequence(element, job, where)
        elif rule.act is Act.TABLE:
            new = element if _is_table(source, element, rule) else None
        else:
            new = None
        if new is not None:
            kept[tag] = new
        if note is not None and new is not element and tag not in REWRITTEN:
            if new is None:
                note(f"{where}{tag}", _keyword(tag), "removed")
            elif rule.act is not Act.SEQUENCE:
                note(f"{where}{tag}", _keyword(tag), SAID[rule.act])
    return kept


def _sequence(element: Element, job: Job, where: str) -> Element | None:
    """Return the sequence with each item cleaned; without the items whose code nobody knows.

    Frames repeat each other's items: the same bytes under the same tag become the same again.
    """
    if job.note is not None or not isinstance(element, RawDataElement):
        return _sequence_anew(element, job, where)
    made = (element.tag, bytes_of(element))
    if made not in job.made:
        job.made[made] = _sequence_anew(element, job, where)
    return job.made[made]


def _sequence_anew(element: Element, job: Job, where: str) -> Element | None:
    items = _items(element, job)
    if items is None:
        return None
    tag, kept = element.tag, list[Item]()
    for number, item in enumerate(items):
        inside = _cleaned(item, job, f"{where}{tag}[{number}]>" if job.note else "")
        if any(code in item for code in CODES) and not _add_code(inside, item, job):
            if job.note:
                job.note(f"{where}{tag}[{number}]", _keyword(tag), "item of unknown code removed")
            continue
        kept.append(inside)
    if items and not kept:
        return None
    if any(not one.is_raw for item in kept for one in item.values()):
        return DataElement(tag, "SQ", Sequence(as_dataset(item, job) for item in kept))
    value = bytes_of_items(kept, little=job.little)  # type: ignore[arg-type]
    return RawDataElement(tag, "SQ", len(value), value, 0, job.implicit, job.little)


def _items(element: Element, job: Job) -> list[Dataset | Item] | None:
    """Return the items of a sequence, None if it is none."""
    if isinstance(element, RawDataElement) and element.VR in ("SQ", None):
        with suppress(ValueError):  # what is unusual is pydicom's to understand
            form = {"implicit": element.is_implicit_VR, "little": element.is_little_endian}
            return items_of(bytes_of(element), **form)  # type: ignore[return-value]
    found = as_dataset({element.tag: element}, job)[element.tag]
    return list(found.value or ()) if found.VR == "SQ" else None


def _add_code(kept: Item, item: Dataset | Item, job: Job) -> bool:
    """Add a code of PS3.16 with the standard's meaning, whatever meaning was written beside it."""
    code = _first(item, "CodingSchemeDesignator"), _first(item, "CodeValue")
    meaning = code_meanings().get(code)
    if meaning is None:
        return False
    _put_code(kept, (*code, meaning), job)
    return True


def _first(item: Dataset | Item, keyword: str) -> str:
    """Return the first value as text; of items as bytes, no code that is not ASCII is known."""
    if isinstance(item, Dataset):
        return first(item, keyword)
    element = item.get(tag_of(keyword))
    return "" if element is None else text_of(element).partition("\\")[0].strip()


def _put_code(kept: Item, code: tuple[str, str, str], job: Job) -> None:
    scheme, value, meaning = code
    put(kept, "CodeValue", "SH", value, job)
    put(kept, "CodingSchemeDesignator", "SH", scheme, job)
    put(kept, "CodeMeaning", "LO", meaning.encode("ascii", "replace").decode()[:64], job)


def _is_table(source: Dataset | Item, element: Element, rule: Rule) -> bool:
    """Return whether a lookup table is as long as its descriptor says, to the byte."""
    tag = tag_of(rule.keyword.replace("Data", "Descriptor"))
    if tag not in source or not element.is_raw:
        return False
    entries = _num_entries(source.get_item(tag) if isinstance(source, Dataset) else source[tag])
    return len(bytes_of(element)) in (2 * entries, entries + entries % 2)


def _num_entries(descriptor: Element) -> int:
    """Return the first value of a table's descriptor, where 0 means 65536 (PS3.3 C.11.1.1)."""
    if isinstance(descriptor, RawDataElement):
        order: Literal["little", "big"] = "little" if descriptor.is_little_endian else "big"
        return int.from_bytes(bytes_of(descriptor)[:2], order) or 2**16
    return int(str(several(descriptor.value)[0])) or 2**16


def _picture(dataset: Dataset, job: Job) -> Element | None:
    """Return the pixels and nothing beside them; None if there are fewer than there should be."""
    element = dataset.get_item(PIXELS)
    found = bytes_of(element)
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        new = pixels.without_comments(found)
        return element if new == found else with_bytes(element, new, job)
    expected = pixels.num_bytes(dataset)
    if len(found) < expected:
        return None
    new = pixels.without_planes(found[:expected], dataset)
    if new is found:
        return element
    return with_bytes(element, new + b"\0" * (len(new) % 2), job)


def _sign(kept: Item, dataset: Dataset, terms: Terms, job: Job) -> None:
    """Write the pseudonym, and what was done, by whom (PS3.3 C.7.1.1, C.12.1)."""
    pseudonym = job.key.pseudonym(job.patient)
    put(kept, "PatientName", "PN", pseudonym, job)
    put(kept, "PatientID", "LO", pseudonym, job)
    put(kept, "PatientIdentityRemoved", "CS", "YES", job)
    put(kept, "DeidentificationMethod", "LO", METHOD, job)
    dates = "MODIFIED" if terms.dates == "shift" else "REMOVED"
    put(kept, "LongitudinalTemporalInformationModified", "CS", dates, job)
    tag = tag_of("DeidentificationMethodCodeSequence")
    value = _method_items(_methods(dataset, terms), job.implicit, job.little)
    kept[tag] = RawDataElement(tag, "SQ", len(value), value, 0, job.implicit, job.little)
    if job.note is not None:
        for keyword in ("PatientName", "PatientID"):
            job.note(str(tag_of(keyword)), keyword, "replaced by a pseudonym")


@cache
def _method_items(methods: tuple[str, ...], implicit: bool, little: bool) -> bytes:
    """Return the items of these codes, encoded: the same in nearly every file."""
    items = []
    for method in methods:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator = method, "DCM"
        item.CodeMeaning = METHODS[method]
        items.append(item)
    stream = DicomBytesIO()
    stream.is_implicit_VR, stream.is_little_endian = implicit, little
    tag = tag_of("DeidentificationMethodCodeSequence")
    write_sequence(stream, DataElement(tag, "SQ", Sequence(items)), ["iso8859"])
    return stream.getvalue()


def _methods(dataset: Dataset, terms: Terms) -> tuple[str, ...]:
    """Return the codes of CID 7050 that hold: those found, which are history, and ours."""
    tag = tag_of("DeidentificationMethodCodeSequence")
    earlier = dataset[tag].value if tag in dataset else ()
    found = [first(item, "CodeValue") for item in earlier]
    ours = {
        "113100": True,
        "113107": terms.dates == "shift",
        "113108": terms.retain_patient,
        "113109": terms.retain_device,
    }
    known = [value for value in found if value in METHODS]
    return tuple(dict.fromkeys(known + [value for value in ours if ours[value]]))


def _meta(dataset: Dataset, kept: Item, job: Job) -> FileMetaDataset:
    """Return file meta information made anew (PS3.10 7.1)."""
    found: Item = {}
    put(found, "MediaStorageSOPClassUID", "UI", text_of(kept[tag_of("SOPClassUID")]), job)
    put(found, "MediaStorageSOPInstanceUID", "UI", text_of(kept[tag_of("SOPInstanceUID")]), job)
    put(found, "TransferSyntaxUID", "UI", dataset.file_meta.TransferSyntaxUID, job)
    put(found, "ImplementationClassUID", "UI", IMPLEMENTATION, job)
    put(found, "ImplementationVersionName", "SH", "CONSILIA", job)
    version = tag_of("FileMetaInformationVersion")
    found[version] = RawDataElement(version, "OB", 2, b"\0\1", 0, False, True)
    length = tag_of("FileMetaInformationGroupLength")
    found[length] = DataElement(length, "UL", 0)  # counted when it is written
    meta = FileMetaDataset(found)
    meta.set_original_encoding(False, True, "iso8859")
    return meta


def _keyword(tag: BaseTag) -> str:
    return "" if tag.is_private else keyword_for_tag(tag)


SAID = {
    Act.WORDS: "unknown words removed",
    Act.UID: "remapped",
    Act.DATE: "shifted",
    Act.DATETIME: "shifted",
    Act.TIME: "emptied",
    Act.AGE: "capped",
    Act.EMPTY: "emptied",
    Act.DUMMY: "replaced",
}
