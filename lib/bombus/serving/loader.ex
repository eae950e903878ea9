defmodule Bombus.Serving.Loader do
  @moduledoc false
  # From the options of a child to its serving: a serving, or a model (loaded here where it is a
  # source) with what belongs to it.

  alias Bombus.{Adapter, Error, Hub, Model, Native, Source, Tokenizer}
  alias Bombus.Serving.Options

  # In milliseconds, for a model that has much to do.
  @patience 10_000

  @typedoc "What makes a serving: `Bombus.Serving.new/3`, which stands above."
  @type new :: (Model.t(), Tokenizer.t() | nil, keyword() -> Bombus.Serving.t())

  @what "a child {Bombus.Serving, options}"
  @serving [
    serving: [
      type_spec: quote(do: Bombus.Serving.t()),
      doc: "made by `Bombus.Serving.new/3`; then no model is given"
    ]
  ]
  @model [
    model: [
      type_spec: quote(do: Bombus.Model.t() | Bombus.source()),
      doc: "a model, or the source of one, which is loaded when the process has started"
    ],
    tokenizer: [
      type_spec: quote(do: Bombus.Tokenizer.t() | Bombus.source()),
      by_default: "the source of the model; required beside a model that is loaded",
      doc: "a tokenizer, a source, or `nil` for none"
    ]
  ]
  @own [
    name: [
      required: true,
      type_spec: quote(do: GenServer.name()),
      doc: "the name to call it by"
    ],
    drain: [
      type: {:custom, {__MODULE__, :check_drain}},
      type_spec: quote(do: timeout()),
      default: 0,
      doc: """
      how many milliseconds requests may go on when the process is told to stop. Meanwhile new ones
      are refused. With 0 all are cancelled
      """
    ]
  ]

  @doc "The options of a child, whatever it is made of."
  def schema, do: @own ++ @serving ++ @model

  @doc "Raises what is wrong with the options, as far as it shows before anything is loaded."
  def check!(options) do
    unless Keyword.keyword?(options) do
      raise ArgumentError,
            "expected a keyword list with serving: or model:, and name:, " <>
              "got: #{Bombus.Options.show(options)}"
    end

    Bombus.Options.known!(Keyword.keys(options), everything(), @what)
    table = table!(options[:serving], options[:model], options)
    Bombus.Options.given!(options, table, @what)
    name!(options[:name])
    Options.check!(Keyword.take(options, Options.keys() -- [:adapter]))
    loaded_or_source!(options[:model], Model)
    loaded_or_source!(options[:tokenizer], Tokenizer)
    loaded_or_source!(options[:adapter], Adapter)
    :ok
  end

  defp loaded_or_source!(%kind{} = handle, kind), do: Bombus.Options.handle!(handle, kind)
  defp loaded_or_source!(nil, _kind), do: :ok
  defp loaded_or_source!(source, _kind), do: Source.check!(source)

  # What goes with a serving, with a model, and with the source of one.
  defp table!(nil, nil, _options) do
    raise ArgumentError, "expected :serving or :model among the options of a serving"
  end

  defp table!(_serving, nil, _options), do: @own ++ @serving

  defp table!(nil, %Model{} = model, options) do
    Bombus.Options.handle!(model, Model)

    unless Keyword.has_key?(options, :tokenizer) do
      raise ArgumentError, "expected :tokenizer beside a model that is loaded, nil for none"
    end

    @own ++ @model ++ Model.Options.limits() ++ sources(Options.schema())
  end

  defp table!(nil, _source, _options), do: everything()

  defp table!(_serving, _model, _options),
    do: raise(ArgumentError, "expected :serving or :model, got both")

  @doc "All options that a child may have."
  def everything do
    load = Model.Options.schema()
    # Of a model that is loaded for one serving it is the same.
    own = Keyword.drop(Options.schema(), Keyword.keys(load))
    schema() ++ load ++ sources(own)
  end

  # An adapter may be a source too.
  defp sources(table) do
    source = [type: :any, type_spec: quote(do: Bombus.Adapter.t() | Bombus.source())]
    Keyword.update!(table, :adapter, &Keyword.merge(&1, source))
  end

  defp name!(nil), do: raise(ArgumentError, "expected :name among the options of a serving")
  defp name!(name) when is_atom(name), do: :ok
  defp name!({:global, _name}), do: :ok

  defp name!({:via, module, _name} = name) when is_atom(module) do
    if Code.ensure_loaded?(module) and function_exported?(module, :register_name, 2),
      do: :ok,
      else: bad_name!(name)
  end

  defp name!(other), do: bad_name!(other)

  @doc "Raises for what is no name of a process."
  @spec bad_name!(term()) :: no_return()
  def bad_name!(name) do
    raise ArgumentError,
          "expected :name to be an atom, {:global, term} or {:via, module, term} with a module " <>
            "that takes such a term, as Registry does, got: #{Bombus.Options.show(name)}"
  end

  @doc false
  def check_drain(:infinity), do: {:ok, :infinity}
  def check_drain(drain) when is_integer(drain) and drain >= 0, do: {:ok, drain}
  def check_drain(_other), do: {:error, "milliseconds or :infinity"}

  @doc "The options as they may be logged: supervisors show them."
  def hide_tokens(options) do
    Keyword.new(options, fn
      {key, source} when key in [:model, :tokenizer, :adapter] -> {key, Hub.Token.hide(source)}
      other -> other
    end)
  end

  @doc "Whether there is nothing to be loaded."
  def given?(options) do
    options[:serving] != nil or
      (match?(%Model{}, options[:model]) and
         (options[:tokenizer] == nil or match?(%Tokenizer{}, options[:tokenizer])) and
         (options[:adapter] == nil or match?(%Adapter{}, options[:adapter])))
  end

  @doc "Whether the model itself is loaded: then it can be loaded anew."
  def loads_model?(options),
    do: options[:serving] == nil and not match?(%Model{}, options[:model])

  @doc "The serving, where there is nothing to be loaded, or an error; else nil."
  @spec given(keyword(), new()) ::
          {:ok, Bombus.Serving.t()} | {:error, Error.t()} | nil
  def given(options, new), do: if(given?(options), do: serving(options, new, nil))

  @doc "Loads what is to be loaded. `on_progress` hears of downloads."
  @spec serving(keyword(), new(), nil | (Bombus.Hub.progress() -> term())) ::
          {:ok, Bombus.Serving.t()} | {:error, Error.t()}
  def serving(options, new, on_progress) do
    with {:ok, serving} <- made(options, new, on_progress),
         :ok <- check_adapter(serving.model, serving.options.adapter),
         do: {:ok, serving}
  rescue
    # What only shows beside the files. A mistake in the options has been raised before.
    error in ArgumentError -> Error.error(:bad_request, Exception.message(error))
  end

  defp made(options, new, on_progress) do
    told = &tell_all(&1, [on_progress, options[:on_progress]])
    load = options |> Keyword.take(load_keys()) |> Keyword.delete(:on_progress)

    with nil <- options[:serving],
         {:ok, model} <- model(options[:model], load, told),
         {:ok, tokenizer} <- tokenizer(Keyword.get(options, :tokenizer, options[:model]), told),
         {:ok, adapter} <- adapter(options[:adapter], told) do
      # A model that was loaded here has its limits already.
      limits =
        if match?(%Model{}, options[:model]), do: Keyword.keys(Model.Options.limits()), else: []

      own = Keyword.take(options, Options.keys() ++ limits)
      {:ok, new.(model, tokenizer, Keyword.put(own, :adapter, adapter))}
    else
      {:error, error} -> {:error, error}
      serving -> {:ok, serving}
    end
  end

  defp model(%Model{} = model, _options, _told), do: {:ok, model}
  defp model(source, options, told), do: Bombus.load_model(source, options ++ told.(source))

  defp tokenizer(nil, _told), do: {:ok, nil}
  defp tokenizer(%Tokenizer{} = tokenizer, _told), do: {:ok, tokenizer}
  defp tokenizer(source, told), do: Bombus.load_tokenizer(source, told.(source))

  defp adapter(nil, _told), do: {:ok, nil}
  defp adapter(%Adapter{} = adapter, _told), do: {:ok, adapter}
  defp adapter(source, told), do: Bombus.load_adapter(source, told.(source))

  # Beside the server: the function of the child, or else of the source.
  defp tell_all({:hf, _id, options}, [server, nil]),
    do: tell_all(nil, [server, options[:on_progress]])

  defp tell_all(_source, [server, nil]), do: [on_progress: server]
  defp tell_all(_source, [server, own]), do: [on_progress: &{server.(&1), own.(&1)}]

  @doc "What a model says to the shortest question."
  def probe(model), do: Native.await(&Native.score(model.ref, [0, 0], nil, @patience, &1))

  defp check_adapter(_model, nil), do: :ok

  defp check_adapter(model, adapter),
    do: Native.await(&Native.check_adapter(model.ref, adapter.ref, &1))

  defp load_keys, do: Keyword.keys(Model.Options.schema())
end
