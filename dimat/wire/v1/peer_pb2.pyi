from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HelloRequest(_message.Message):
    __slots__ = ("protocol", "dimat", "run", "agent", "schema", "base", "encodings", "groups", "settings")
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DIMAT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    dimat: str
    run: str
    agent: str
    schema: str
    base: str
    encodings: _containers.RepeatedScalarFieldContainer[str]
    groups: str
    settings: _containers.ScalarMap[str, str]
    def __init__(self, protocol: _Optional[int] = ..., dimat: _Optional[str] = ..., run: _Optional[str] = ..., agent: _Optional[str] = ..., schema: _Optional[str] = ..., base: _Optional[str] = ..., encodings: _Optional[_Iterable[str]] = ..., groups: _Optional[str] = ..., settings: _Optional[_Mapping[str, str]] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("protocol", "dimat", "run", "agent", "schema", "base", "encodings", "certificate", "max_streams", "time_s", "groups", "settings")
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DIMAT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    dimat: str
    run: str
    agent: str
    schema: str
    base: str
    encodings: _containers.RepeatedScalarFieldContainer[str]
    certificate: bytes
    max_streams: int
    time_s: float
    groups: str
    settings: _containers.ScalarMap[str, str]
    def __init__(self, protocol: _Optional[int] = ..., dimat: _Optional[str] = ..., run: _Optional[str] = ..., agent: _Optional[str] = ..., schema: _Optional[str] = ..., base: _Optional[str] = ..., encodings: _Optional[_Iterable[str]] = ..., certificate: _Optional[bytes] = ..., max_streams: _Optional[int] = ..., time_s: _Optional[float] = ..., groups: _Optional[str] = ..., settings: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ManifestsRequest(_message.Message):
    __slots__ = ("seen", "wait_ms", "session")
    SEEN_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    seen: int
    wait_ms: int
    session: str
    def __init__(self, seen: _Optional[int] = ..., wait_ms: _Optional[int] = ..., session: _Optional[str] = ...) -> None: ...

class ManifestsReply(_message.Message):
    __slots__ = ("sequence", "offered", "leaving", "session")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    offered: _containers.RepeatedCompositeFieldContainer[SignedManifest]
    leaving: str
    session: str
    def __init__(self, sequence: _Optional[int] = ..., offered: _Optional[_Iterable[_Union[SignedManifest, _Mapping]]] = ..., leaving: _Optional[str] = ..., session: _Optional[str] = ...) -> None: ...

class SignedManifest(_message.Message):
    __slots__ = ("manifest", "signature")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    signature: bytes
    def __init__(self, manifest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("run", "agent", "round", "basis", "schema", "payload", "encoding", "forms", "base", "samples", "parents", "pushed", "metrics")
    class PushedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    run: str
    agent: str
    round: int
    basis: str
    schema: str
    payload: Payload
    encoding: str
    forms: _containers.RepeatedCompositeFieldContainer[Form]
    base: str
    samples: int
    parents: _containers.RepeatedCompositeFieldContainer[Parent]
    pushed: _containers.ScalarMap[str, float]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, run: _Optional[str] = ..., agent: _Optional[str] = ..., round: _Optional[int] = ..., basis: _Optional[str] = ..., schema: _Optional[str] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ..., encoding: _Optional[str] = ..., forms: _Optional[_Iterable[_Union[Form, _Mapping]]] = ..., base: _Optional[str] = ..., samples: _Optional[int] = ..., parents: _Optional[_Iterable[_Union[Parent, _Mapping]]] = ..., pushed: _Optional[_Mapping[str, float]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Payload(_message.Message):
    __slots__ = ("root", "bytes", "block_bytes", "blocks")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    bytes: int
    block_bytes: int
    blocks: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, root: _Optional[bytes] = ..., bytes: _Optional[int] = ..., block_bytes: _Optional[int] = ..., blocks: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Form(_message.Message):
    __slots__ = ("encoding", "after", "payload")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    encoding: str
    after: bytes
    payload: Payload
    def __init__(self, encoding: _Optional[str] = ..., after: _Optional[bytes] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ...) -> None: ...

class Parent(_message.Message):
    __slots__ = ("agent", "root", "round", "weight")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    agent: str
    root: bytes
    round: int
    weight: float
    def __init__(self, agent: _Optional[str] = ..., root: _Optional[bytes] = ..., round: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("root", "first_block", "blocks")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    root: bytes
    first_block: int
    blocks: int
    def __init__(self, root: _Optional[bytes] = ..., first_block: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class DialBackRequest(_message.Message):
    __slots__ = ("port",)
    PORT_FIELD_NUMBER: _ClassVar[int]
    port: int
    def __init__(self, port: _Optional[int] = ...) -> None: ...

class DialBackReply(_message.Message):
    __slots__ = ("reached", "address", "reason")
    REACHED_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    reached: bool
    address: str
    reason: str
    def __init__(self, reached: bool = ..., address: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
