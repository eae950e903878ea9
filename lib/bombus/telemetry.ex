defmodule Bombus.Telemetry do
  @moduledoc """
  The events that Bombus emits through [`:telemetry`](https://hexdocs.pm/telemetry), where the
  application has it among its dependencies. Without it nothing is emitted.

  Times are in native units, as in `System.convert_time_unit/3`, and sizes in bytes.

  ## Generation

  Emitted in the process that asked (from another node: in a process on the serving's node). A
  process that is killed while it waits emits no end.

    * `[:bombus, :generation, :start]` - a request goes into the queue

        * Measurements: `%{system_time: integer, monotonic_time: integer}`
        * Metadata: `%{model: String.t(), serving: term, adapter: Bombus.Adapter.t() | nil,
          request: reference}`. `:serving` is the name of a serving in a supervision tree, else `nil`

    * `[:bombus, :generation, :stop]` - it has its answer, or was cancelled

        * Measurements: `%{duration: integer, queue_time: integer, time_to_first_token: integer | nil,
          input_tokens: integer, cached_tokens: integer, output_tokens: integer,
          tokens_per_second: float}`. `:queue_time` ends with the first step,
          `:time_to_first_token` begins with the request; `:tokens_per_second` leaves out the queue
        * Metadata: that of the start, and `:finish_reason`

    * `[:bombus, :generation, :exception]` - it failed, or was refused

        * Measurements: `%{duration: integer}`
        * Metadata: that of the start, and `%{kind: :error, reason: Bombus.Error.t(), stacktrace: []}`

  ## Engine

    * `[:bombus, :engine, :step]` - a model has computed a step. Emitted in a process of Bombus:
      handlers that are slow hold nothing up, but fall behind

        * Measurements: `%{duration: integer, batch_size: integer, rows: integer, queue: integer,
          kv_bytes: integer, prefix_cache_bytes: integer}`. `:batch_size` is how many sequences took
          part, `:rows` how many tokens were computed, `:queue` how many requests waited
        * Metadata: `%{model: String.t(), device: :cpu | :gpu | {:mlx, :cpu}}`

  ## Loading

    * `[:bombus, :load, :start]`

        * Measurements: `%{system_time: integer, monotonic_time: integer}`
        * Metadata: `%{kind: :model | :adapter | :tokenizer, source: String.t()}`

    * `[:bombus, :load, :stop]` - measurements: `%{duration: integer}`; the same metadata

    * `[:bombus, :load, :exception]` - measurements: `%{duration: integer}`; the same metadata, with
      `%{error: Bombus.Error.t(), stacktrace: []}`

  ## Examples

      :telemetry.attach("log-slow-answers", [:bombus, :generation, :stop], fn _event, measured, meta, _ ->
        milliseconds = System.convert_time_unit(measured.duration, :native, :millisecond)
        if milliseconds > 5_000, do: Logger.info("\#{meta.model} took \#{milliseconds} ms")
      end, nil)
  """

  use GenServer

  alias Bombus.{Error, Model, Native, Source}

  # Only where the application brings it.
  @compile {:no_warn_undefined, :telemetry}

  @doc false
  # Asked once: a module that is not there is looked for in all paths.
  def children do
    available? = Code.ensure_loaded?(:telemetry)
    :persistent_term.put(__MODULE__, available?)
    if available?, do: [__MODULE__], else: []
  end

  @doc false
  def child_spec(options), do: super(options)

  @doc false
  def start_link(_options), do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)

  @doc false
  # From now on, the model's steps are events.
  def watch(%Model{} = model) do
    with pid when is_pid(pid) <- Process.whereis(__MODULE__) do
      Native.watch(model.ref, pid, {:step, %{model: model.name, device: model.device}})
    end
  end

  @doc false
  # `load` returns {:ok, loaded} or {:error, error}.
  def load(kind, source, load) do
    metadata = %{kind: kind, source: Source.name(source)}
    start = start([:bombus, :load], metadata)
    result = load.()

    case result do
      {:ok, _loaded} ->
        execute([:bombus, :load, :stop], %{duration: since(start)}, metadata)

      {:error, %Error{} = error} ->
        metadata = Map.merge(metadata, %{error: error, stacktrace: []})
        execute([:bombus, :load, :exception], %{duration: since(start)}, metadata)
    end

    result
  end

  @doc false
  # -> when it began
  def start(prefix, metadata, start \\ System.monotonic_time()) do
    measurements = %{system_time: System.system_time(), monotonic_time: start}
    execute(prefix ++ [:start], measurements, metadata)
    start
  end

  @doc false
  def since(start), do: System.monotonic_time() - start

  @doc false
  def execute(event, measurements, metadata) do
    if available?(), do: :telemetry.execute(event, measurements, metadata)
    :ok
  end

  defp available?, do: :persistent_term.get(__MODULE__, false)

  @impl true
  def init(nil), do: {:ok, nil}

  @impl true
  def handle_info({{:step, metadata}, step}, state) do
    measurements = Map.update!(step, :duration, &native/1)
    execute([:bombus, :engine, :step], measurements, metadata)
    {:noreply, state}
  end

  def handle_info(_other, state), do: {:noreply, state}

  @doc false
  # From nanoseconds.
  def native(nil), do: nil
  def native(time), do: System.convert_time_unit(time, :nanosecond, :native)
end
