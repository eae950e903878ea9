defmodule Bombus.Hub do
  @moduledoc """
  Models, tokenizers and adapters from the [Hugging Face Hub](https://huggingface.co).

      {:ok, model} = Bombus.load_model({:hf, "mlx-community/Qwen3-0.6B-4bit"})
      {:ok, tokenizer} = Bombus.load_tokenizer({:hf, "mlx-community/Qwen3-0.6B-4bit"})

  A source is `{:hf, id}` or `{:hf, id, options}`:

  #{Bombus.Options.docs(Bombus.Hub.Options.schema())}
  The environment variable `HF_ENDPOINT` names another Hub or a mirror; `HTTPS_PROXY`, `HTTP_PROXY` and
  `NO_PROXY` name proxies.

  ## The cache

  Bombus uses the cache of Python's huggingface_hub. It finds what `hf download`, mlx-lm or transformers
  have downloaded, and they find what Bombus has downloaded. `cached/1` lists the cache and `delete/1`
  removes from it, as `hf cache` does.

  Only the files that are needed are downloaded, four at once, straight to the disk. An interrupted
  download goes on where it ended. A file gets its name when its size and its hash are those that the
  Hub has announced. Processes and VMs that want the same file share one download.

  The cache may be a link to another disk, and so may a repository's folder in it. Links from there to
  files outside are not followed.

  ## Errors

  `{:error, %Bombus.Error{reason: reason}}`:

    * `:not_found` - there is no such repository (or it is private), or no such file in it
    * `:revision_not_found` - the repository has no such branch, tag or commit
    * `:gated`, `:unauthorized` - the message says what to do
    * `:rate_limited` - the Hub asks to wait for more than ten minutes, or asks again and again. Shorter
      waits are waited
    * `:server_error`, `:no_network` - after five attempts, with growing pauses between them, or after two
      where less than 1 kB a second came for 20 seconds. The next call goes on where this one ended
    * `:bad_download` - twice, what came was not what the Hub had announced; or the size was not announced,
      and there was more than 1 GiB
    * `:io` - a file of the cache cannot be read or written, or is a link out of the cache
    * `:disk_full` - there is no room for a file
    * `:busy` - `delete/1` while a download runs
    * `:offline` - not all is in the cache, and Bombus is told to stay offline

  When all is in the cache already, a Hub that cannot be reached or refuses is only a warning in the log.
  """

  alias Bombus.{Error, Native}
  alias Bombus.Hub.{Cache, Options, Progress}

  require Logger

  @typedoc "`owner/name`"
  @type id :: String.t()

  @typedoc """
  How far a download is: bytes that are here and bytes that are needed, as far as that is known; bytes a
  second; seconds that remain (`nil`: not known).
  """
  @type progress :: %{
          id: id(),
          bytes: non_neg_integer(),
          total: non_neg_integer(),
          rate: float(),
          remaining: non_neg_integer() | nil
        }

  @typedoc "A repository in the cache: see `cached/1`."
  @type repository :: %{
          id: id(),
          kind: :model | :adapter | :tokenizer | nil,
          revisions: [%{commit: String.t(), names: [String.t()], path: Path.t()}],
          size: non_neg_integer(),
          path: Path.t(),
          last_used: DateTime.t() | nil
        }

  @typedoc "What is downloaded of a repository; `:any` is the model and its tokenizer, or the adapter."
  @type kind :: :model | :tokenizer | :adapter | :any

  @typedoc "An option of a source `{:hf, id, options}`."
  @type option :: unquote(Bombus.Options.Spec.option(Options.schema()))

  @kinds [:model, :tokenizer, :adapter, :any]
  @kind [
    kind: [
      type: {:in, @kinds},
      default: :any,
      doc:
        "what is needed of the repository; `:any` is the model and its tokenizer, or the adapter"
    ]
  ]

  @doc """
  Downloads what is needed of a repository, and returns the folder.

  ## Options

  Those of a source, and

  #{Bombus.Options.docs(@kind)}
  ## Examples

      {:ok, folder} = Bombus.Hub.download("mlx-community/Qwen3-0.6B-4bit")
  """
  @spec download(id(), [option() | {:kind, kind()}]) :: {:ok, Path.t()} | {:error, Error.t()}
  def download(id, options \\ []) do
    {kind, options} = id |> Options.validate!(options, @kind) |> Keyword.pop!(:kind)
    fetch(id, options, kind)
  end

  @doc """
  Whether all files of a model, a tokenizer or an adapter are in the cache, so that loading needs no
  network. `:any` is a model or an adapter.

  ## Examples

      Bombus.Hub.cached?({:hf, "mlx-community/Qwen3-0.6B-4bit"})
      Bombus.Hub.cached?("mlx-community/Qwen3-0.6B-4bit", :tokenizer)
  """
  @spec cached?(id() | {:hf, id()} | {:hf, id(), [option()]}, kind()) :: boolean()
  def cached?(source, kind \\ :any)
  def cached?({:hf, id}, kind), do: cached?({:hf, id, []}, kind)
  def cached?(id, kind) when is_binary(id), do: cached?({:hf, id, []}, kind)

  def cached?({:hf, id, options}, kind) do
    wanted = Options.wanted!(id, options)
    kind = Bombus.Options.value!(:kind, kind, @kind[:kind])
    match?({:ok, _folder}, Native.await(&Native.cached(wanted, kind, &1)))
  end

  def cached?(other, _kind) do
    raise ArgumentError,
          "expected {:hf, \"owner/name\"}, got: #{Bombus.Options.show(other)}"
  end

  @doc """
  What is in the cache: a list of repositories, by their ids.

    * `:id` - `"owner/name"`
    * `:kind` - `:model`, `:adapter`, `:tokenizer`, or `nil` for something else
    * `:revisions` - what has been downloaded of it: `:commit`, `:names` (branches and tags that are this
      commit, as far as is known here) and `:path`, its folder
    * `:size` - the bytes that it takes on the disk
    * `:path` - its folder
    * `:last_used` - when one of its files was last read, as far as the file system notes that

  ## Options

  #{Bombus.Options.docs(Keyword.take(Bombus.Hub.Options.schema(), [:cache_dir]))}
  ## Examples

      for %{id: id, size: size} <- Bombus.Hub.cached(), do: IO.puts("\#{id}: \#{size} bytes")
  """
  @spec cached([{:cache_dir, Path.t() | nil}]) :: [repository()]
  def cached(options \\ []) do
    table = Keyword.take(Options.schema(), [:cache_dir])
    options = Bombus.Options.validate!(options, table, "Bombus.Hub.cached/1")
    Cache.list(Options.cache(options[:cache_dir]))
  end

  @doc """
  Removes a repository from the cache, with all its revisions, and returns how many bytes that has
  freed.

  A model that was loaded from it goes on working. The files of an interrupted download are removed too.
  While a download runs, in whatever process, the answer is `{:error, %Bombus.Error{reason: :busy}}`. A
  repository that is not in the cache is `:not_found`.

  ## Examples

      {:ok, bytes} = Bombus.Hub.delete("mlx-community/Qwen3-0.6B-4bit")
      {:ok, bytes} = Bombus.Hub.delete({:hf, "owner/name", cache_dir: "/mnt/models"})
  """
  @spec delete(id() | {:hf, id()} | {:hf, id(), [option()]}) ::
          {:ok, non_neg_integer()} | {:error, Error.t()}
  def delete({:hf, id}), do: delete({:hf, id, []})
  def delete(id) when is_binary(id), do: delete({:hf, id, []})

  def delete({:hf, id, options}) do
    options = Options.validate!(id, options)

    for key <- [:revision, :subdir], options[key] do
      raise ArgumentError,
            "expected no #{inspect(key)}: a repository is removed from the cache as a whole"
    end

    cache = Options.cache(options[:cache_dir])
    Native.await(&Native.remove_cached(cache, id, &1))
  end

  def delete(other) do
    raise ArgumentError,
          "expected {:hf, \"owner/name\"}, got: #{Bombus.Options.show(other)}"
  end

  @doc false
  # `on_progress` of the call goes before that of the source.
  def fetch(id, options, kind, on_progress \\ nil) do
    wanted = Options.wanted!(id, options)
    progress = Progress.new(id, on_progress || options[:on_progress])
    reference = make_ref()

    with {:ok, download} <- Error.from_native(Native.fetch(wanted, kind, reference)) do
      try do
        listen(reference, progress)
      after
        # Where a function of the caller's has raised.
        Native.stop_fetch(download)
        forget(reference)
      end
    end
  end

  defp listen(reference, progress) do
    receive do
      {^reference, {:progress, bytes, total, received}} ->
        listen(reference, Progress.update(progress, bytes, total, received))

      {^reference, {:waiting, reason, milliseconds}} ->
        Progress.clear(progress)
        Logger.warning("#{reason}. Trying again in #{Float.round(milliseconds / 1000, 1)} s")
        listen(reference, progress)

      {^reference, {:warning, message}} ->
        Progress.clear(progress)
        Logger.warning(message)
        listen(reference, progress)

      {^reference, {:done, answer}} ->
        Progress.finish(progress)
        Error.from_native(answer)
    end
  end

  defp forget(reference) do
    receive do
      {^reference, _event} -> forget(reference)
    after
      0 -> :ok
    end
  end
end
