"""A PACS over DICOMweb: what it holds by QIDO-RS, the images by WADO-RS.

Guarantees:
    A series that is here whole is not fetched again.
    No message names a study, a series or what a query found.

Design: dicomweb-client gives each instance as it arrives, so that memory does not grow with the
series. Retrieval asks for the images as they are stored: converting them would cost the PACS time
and the images their bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from client.ingest.pacs import Query, Series, WebPacs
from client.ingest.sources import Arrival
from shared_models.errors import ConsiliaError, DocumentError

AS_STORED = (("application/dicom", "*"),)
#: They log addresses, which name studies.
TALKATIVE = ("dicomweb_client", "retrying", "urllib3")
SERIES_UID, STUDY_UID, NUMBER = "0020000E", "0020000D", "00201209"


def search(pacs: WebPacs, query: Query) -> list[Series]:
    """Return the series that ``query`` asks for, each once.

    Raises:
        ConsiliaError: if the PACS cannot be asked, with the cure.
    """
    client = _client(pacs)
    found: dict[str, Series] = {}
    for keys in query.parts():
        with _told(pacs):
            rows = client.search_for_series(
                search_filters=keys, fields=["NumberOfSeriesRelatedInstances"], get_remaining=True
            )
        for row in rows:
            series = _series(row)
            found.setdefault(series.series, series)
    return list(found.values())


def pull(
    pacs: WebPacs, query: Query, *, is_whole: Callable[[Series], bool] = lambda _: False
) -> Iterator[Arrival]:
    """Yield the images of every series that is not here whole.

    Raises:
        ConsiliaError: if the PACS cannot be asked, with the cure; what came before is kept.
    """
    client = _client(pacs)
    for series in search(pacs, query):
        if is_whole(series):
            continue
        with _told(pacs):
            for dataset in client.iter_series(series.study, series.series, media_types=AS_STORED):
                yield Arrival(lambda dataset=dataset: dataset)  # type: ignore[misc]


def _client(pacs: WebPacs) -> Any:
    from dicomweb_client.api import DICOMwebClient
    from dicomweb_client.session_utils import create_session, create_session_from_user_pass

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if pacs.user and pacs.password is not None:
        session = create_session_from_user_pass(pacs.user, _secret(pacs.password))
    else:
        session = create_session()
    if pacs.authority is not None:
        session.verify = str(pacs.authority)
    headers = {} if pacs.token is None else {"Authorization": f"Bearer {_secret(pacs.token)}"}
    client = DICOMwebClient(
        pacs.address, session=session, headers=headers, timeout=pacs.timeout_s, permissive_uid=True
    )
    client.set_http_retry_params(retry=True, max_attempts=4, wait_exponential_multiplier=500)
    return client


def _secret(file: Any) -> str:
    try:
        return str(file.read_text(encoding="utf-8")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"cannot read the secret in {file}: {type(error).__name__}") from None


def _series(row: dict[str, Any]) -> Series:
    try:
        number = _value(row, NUMBER)
        return Series(
            study=str(_value(row, STUDY_UID)),
            series=str(_value(row, SERIES_UID)),
            num_instances=None if number is None else int(number),
        )
    except (ValidationError, ValueError, TypeError, AttributeError):
        raise ConsiliaError(
            "the PACS answered a search without the UIDs of study and series; ask its maker"
        ) from None


def _value(row: dict[str, Any], tag: str) -> Any:
    values = row.get(tag, {}).get("Value") or [None]
    return values[0]


@contextmanager
def _told(pacs: WebPacs) -> Iterator[None]:
    """Tell what went wrong with a request in words that name no patient's study."""
    import requests

    try:
        yield
    except requests.HTTPError as error:
        status = 0 if error.response is None else error.response.status_code
        raise ConsiliaError(_status_sentence(status)) from None
    except requests.exceptions.SSLError:
        raise ConsiliaError(
            "the PACS's certificate is not trusted; name its authority in pacs.web.authority"
        ) from None
    except requests.Timeout:
        raise ConsiliaError(
            f"the PACS did not answer within {pacs.timeout_s:g} s; try again, or raise "
            "pacs.web.timeout_s"
        ) from None
    except requests.RequestException as error:
        raise ConsiliaError(
            f"the PACS cannot be reached ({type(error).__name__}); check pacs.web.address and the "
            "firewall"
        ) from None


def _status_sentence(status: int) -> str:
    if status in (401, 403):
        return (
            f"the PACS refuses ({status}); check pacs.web.user and password, or token, and ask its "
            "administrator for the right to search and retrieve"
        )
    if status == 404:
        return "the PACS knows no DICOMweb service there (404); check pacs.web.address"
    return f"the PACS answers {status}; try again, and see its log"
