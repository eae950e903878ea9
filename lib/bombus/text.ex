defmodule Bombus.Text do
  alias Bombus.{Embedding, Model, Options, Serving, Tensor, Tokenizer}

  @bumblebee [
    defn_options: [type: :keyword, doc: "accepted, and without effect: nothing is compiled"],
    preallocate_params: [type: :boolean, doc: "accepted, and without effect"]
  ]
  @compiled [
              compile: [
                type: :keyword,
                doc: "accepted, and without effect: texts of all lengths go together"
              ]
            ] ++ @bumblebee

  @moduledoc """
  Text generation and embeddings as an `Nx.Serving`, with Bumblebee's inputs and outputs. Needs `:nx`.

      serving = Bombus.Text.generation(model, tokenizer, adapter: adapter, max_new_tokens: 100)
      Nx.Serving.run(serving, "Write a post")
      #=> %{results: [%{text: "...", token_summary: %{input: 12, output: 40, padding: 0, cached: 0}, ...}]}

      # in a supervision tree
      {Nx.Serving, serving: serving, name: MyLLM}
      Nx.Serving.batched_run(MyLLM, "Write a post")

  As any `Nx.Serving`, it can be called from another node of a cluster on which only Nx is loaded.

  Requests of many callers run in the engine's one batch, whatever the serving's `:batch_size` and
  partitions are: only the permission to begin goes through the serving's process. The `:batch_size` is
  set to 1; a larger one would only add its `:batch_timeout`.
  """

  # Asked for when a serving is made: the package works without Nx.
  @compile {:no_warn_undefined, [Nx, Nx.Batch, Nx.Serving]}

  @typedoc "An option of `generation/3`."
  @type option :: Serving.option() | unquote(Options.Spec.option(@bumblebee))

  @typedoc "An option of `text_embedding/3`."
  @type embedding_option :: Bombus.embed_option() | unquote(Options.Spec.option(@compiled))

  @doc """
  A serving that generates text.

  Takes the inputs of `Bombus.Serving` (a string, `%{text: _, seed: _}`, messages, token ids, a list of
  those) and its options, for the serving and beside each input. As in Bumblebee:

    * with `:stream`, `Nx.Serving.run/2` and `batched_run/2` return a stream of text, which ends with
      `{:done, result}` where `:stream_done` says so
    * of `:compile`, `:sequence_length` bounds prompt and text together

  ## Options

  Those of `Bombus.Serving.new/3`, and

  #{Options.docs(@bumblebee)}
  What goes wrong at run time is `{:error, %Bombus.Error{}}` in place of a result, and raised by a
  stream. The death of the calling process cancels the request, also on another node. So does halting a
  stream, except on another node: Nx does not tell of it. `Bombus.Serving.stream/2` does.
  """
  @spec generation(Model.t(), Tokenizer.t() | nil, [option()]) :: struct()
  def generation(model, tokenizer, options \\ []) do
    needs_nx!()
    options = Options.pairs!(options, "Bombus.Text.generation/3")

    {bumblebee, options} = Keyword.split(options, Keyword.keys(@bumblebee))
    Options.given!(bumblebee, @bumblebee, "Bombus.Text.generation/3")
    serving = Serving.new(model, tokenizer, options)
    nx = permission(&checked!(&1, serving))

    if serving.options.stream do
      nx
      |> Nx.Serving.streaming(hooks: [])
      |> Nx.Serving.client_postprocessing(fn permission, input ->
        Stream.flat_map([:begin], fn :begin ->
          Stream.run(permission)
          Serving.run(serving, input)
        end)
      end)
    else
      Nx.Serving.client_postprocessing(nx, fn _permission, input ->
        follow_client()
        Serving.run(serving, input)
      end)
    end
  end

  @doc """
  A serving that makes embeddings: those of `Bombus.embed/4`, with Bumblebee's output.

  Takes a string, and gives `%{embedding: tensor}`, a tensor `{dimensions}` of `:f32`; for a list of
  strings a list of those. What goes wrong at run time is `{:error, %Bombus.Error{}}` in their place.

      serving = Bombus.Text.text_embedding(model, tokenizer)
      Nx.Serving.run(serving, "Bees eat nectar and pollen.")
      #=> %{embedding: #Nx.Tensor<f32[1024] ...>}

  ## Options

  #{Options.docs(Embedding.schema())}
  As in Bumblebee:

  #{Options.docs(@compiled)}
  """
  @spec text_embedding(Model.t(), Tokenizer.t(), [embedding_option()]) :: struct()
  def text_embedding(model, tokenizer, options \\ []) do
    needs_nx!()
    model = Options.handle!(model, Model)
    tokenizer = Options.handle!(tokenizer, Tokenizer)
    options = Options.pairs!(options, "Bombus.Text.text_embedding/3")
    {bumblebee, options} = Keyword.split(options, Keyword.keys(@compiled))
    Options.given!(bumblebee, @compiled, "Bombus.Text.text_embedding/3")
    options = Embedding.options!(options, model, "Bombus.Text.text_embedding/3")

    fn input ->
      texts = if is_list(input), do: input, else: [input]
      {input, Embedding.texts!(texts, "the input")}
    end
    |> permission()
    |> Nx.Serving.client_postprocessing(fn _permission, {input, texts} ->
      follow_client()

      with {:ok, vectors} <- Embedding.run(model, tokenizer, texts, options) do
        embeddings = for vector <- vectors, do: %{embedding: Tensor.to_nx(vector)}
        if is_list(input), do: embeddings, else: hd(embeddings)
      end
    end)
  end

  defp needs_nx! do
    unless Code.ensure_loaded?(Nx.Serving) do
      raise "Bombus.Text needs Nx: add {:nx, \"~> 0.10\"} to your dependencies, or use " <>
              "Bombus.Serving and Bombus.embed/4"
    end
  end

  # No computation of Nx's: one number goes through, and the client asks the engine.
  defp permission(check) do
    fn _defn_options -> fn _batch -> Nx.u8([0]) end end
    |> Nx.Serving.new([])
    |> Nx.Serving.process_options(batch_size: 1)
    |> Nx.Serving.client_preprocessing(&{Nx.Batch.stack([Nx.u8(0)]), check.(&1)})
  end

  # What the caller wrote is checked before anything goes through the serving.
  # What a visitor typed wrongly is answered by the run.
  defp checked!(inputs, serving) when is_list(inputs),
    do: inputs |> Serving.Input.list!() |> Enum.map(&checked!(&1, serving))

  defp checked!(input, serving) do
    _checked = Serving.Input.normalize!(input, serving)
    input
  end

  # For a client on another node, Nx runs this in a process that the client's has spawned here, and
  # that does not end with it.
  defp follow_client do
    with {:parent, client} when is_pid(client) and node(client) != node() <-
           Process.info(self(), :parent) do
      own = self()

      spawn(fn ->
        client = Process.monitor(client)
        Process.monitor(own)

        receive do
          {:DOWN, ^client, :process, _pid, _reason} -> Process.exit(own, :kill)
          {:DOWN, _own, :process, _pid, _reason} -> :ok
        end
      end)
    end
  end
end
