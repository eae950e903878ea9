defmodule Bombus.Safetensors do
  @moduledoc """
  Tensors in files of the [safetensors format](https://huggingface.co/docs/safetensors).

      {:ok, tensors} = Bombus.Safetensors.read("model.safetensors")
      tensors["model.norm.weight"]
      #=> #Bombus.Tensor<bf16[1024]>

      :ok = Bombus.Safetensors.write("copy.safetensors", tensors)

  A path is a file, or a folder with a checkpoint: `model.safetensors`, or the shards that
  `model.safetensors.index.json` names, or else every `model*.safetensors`. The safetensors crate checks
  every header.

  Files are mapped, and a tensor's binary is a part of the mapped file. So reading a checkpoint of many
  gigabytes takes milliseconds, and memory only for what is looked at. Do not write to a file whose
  tensors are in use: their bytes would be of both versions, and zeros where the file has become
  shorter. Write to another file and rename it.

  Errors are `{:error, %Bombus.Error{reason: reason}}` with `:not_found`, `:io`, `:disk_full`, or
  `:bad_checkpoint` for what is no such file.
  """

  alias Bombus.{Error, Native, Options, Tensor}

  @types %{
    "BOOL" => {:bool, 8},
    "U8" => {:u, 8},
    "I8" => {:s, 8},
    "U16" => {:u, 16},
    "I16" => {:s, 16},
    "U32" => {:u, 32},
    "I32" => {:s, 32},
    "U64" => {:u, 64},
    "I64" => {:s, 64},
    "F16" => {:f, 16},
    "BF16" => {:bf, 16},
    "F32" => {:f, 32},
    "F64" => {:f, 64},
    "C64" => {:c, 64},
    "F8_E5M2" => {:f, 8},
    "F8_E4M3" => {:f8_e4m3fn, 8},
    "F8_E8M0" => {:f8_e8m0, 8},
    "F8_E4M3FNUZ" => {:f8_e4m3fnuz, 8},
    "F8_E5M2FNUZ" => {:f8_e5m2fnuz, 8},
    "F6_E2M3" => {:f6_e2m3, 6},
    "F6_E3M2" => {:f6_e3m2, 6},
    "F4" => {:f4, 4}
  }
  @dtypes Map.new(@types, fn {dtype, type} -> {type, dtype} end)

  @as [
    as: [
      type: {:in, [:bombus, :nx]},
      default: :bombus,
      doc: "`:nx` for tensors of Nx, which are copied; `:bombus` for `Bombus.Tensor`"
    ]
  ]
  @read [
          only: [
            type: {:list, :string},
            doc: "the names of those that are wanted",
            by_default: "all"
          ]
        ] ++ @as
  @write [
    metadata: [
      type: {:custom, {__MODULE__, :check_metadata}},
      type_spec: quote(do: %{String.t() => String.t()}),
      doc: "what `read_header/1` gives under `\"__metadata__\"`"
    ]
  ]

  @typedoc "A `Bombus.Tensor`, or a tensor of Nx."
  @type tensor :: Tensor.t() | struct()

  @typedoc "An option of `read/2`."
  @type read_option :: unquote(Options.Spec.option(@read))

  @typedoc "An option of `read_tensor/3`."
  @type read_tensor_option :: unquote(Options.Spec.option(@as))

  @typedoc "An option of `write/3`."
  @type write_option :: unquote(Options.Spec.option(@write))

  @typedoc "What `read_header/1` says of a tensor, and of the file."
  @type header :: %{String.t() => header_entry() | %{String.t() => String.t()}}

  @typedoc "A tensor of a file: its type, by the format's name and as Nx has it, and its shape."
  @type header_entry :: %{dtype: String.t(), type: Tensor.type(), shape: Tensor.shape()}

  @doc """
  All tensors by their names, or some of them.

  ## Options

  #{Options.docs(@read)}
  """
  @spec read(Path.t(), [read_option()]) ::
          {:ok, %{String.t() => tensor()}} | {:error, Error.t()}
  def read(path, options \\ []) do
    options = Options.validate!(options, @read, "Bombus.Safetensors.read/2")
    as = as(options[:as])

    with {:ok, {files, entries, _metadata}} <- open(path) do
      known = Map.new(entries, fn {name, dtype, shape} -> {name, {dtype, shape}} end)
      names = options[:only] || Map.keys(known)

      Enum.reduce_while(names, {:ok, %{}}, fn name, {:ok, tensors} ->
        case tensor(files, known, name, path) do
          {:ok, tensor} -> {:cont, {:ok, Map.put(tensors, name, as.(tensor))}}
          {:error, error} -> {:halt, {:error, error}}
        end
      end)
    end
  end

  @doc """
  What is in a file, without its tensors: `%{name => %{dtype: "BF16", type: {:bf, 16}, shape: {2, 3}}}`,
  and under `"__metadata__"` a map of strings, where there is one.
  """
  @spec read_header(Path.t()) :: {:ok, header()} | {:error, Error.t()}
  def read_header(path) do
    with {:ok, {_files, entries, metadata}} <- open(path) do
      header =
        Map.new(entries, fn {name, dtype, shape} ->
          {name, %{dtype: dtype, type: @types[dtype], shape: List.to_tuple(shape)}}
        end)

      {:ok, if(metadata, do: Map.put(header, "__metadata__", metadata), else: header)}
    end
  end

  @doc """
  One tensor. A name that is not there is `:not_found`.

  ## Options

  #{Options.docs(@as)}
  """
  @spec read_tensor(Path.t(), String.t(), [read_tensor_option()]) ::
          {:ok, tensor()} | {:error, Error.t()}
  def read_tensor(path, name, options \\ []) do
    options = Options.validate!(options, @as, "Bombus.Safetensors.read_tensor/3")

    unless is_binary(name) and String.valid?(name) do
      raise ArgumentError, "expected the name of a tensor, got: #{Options.show(name)}"
    end

    with {:ok, tensors} <- read(path, only: [name], as: options[:as]) do
      {:ok, tensors[name]}
    end
  end

  @doc """
  Writes tensors, Nx's or `Bombus.Tensor`s, to a file. The file is written beside its place and renamed
  when it is whole. A link in its place is replaced; the file that it points to is left alone.

  ## Options

  #{Options.docs(@write)}
  """
  @spec write(Path.t(), %{String.t() => tensor()} | [{String.t() | atom(), tensor()}], [
          write_option()
        ]) ::
          :ok | {:error, Error.t()}
  def write(path, tensors, options \\ []) do
    options = Options.validate!(options, @write, "Bombus.Safetensors.write/3")
    entries = tensors |> pairs!() |> Enum.map(&entry!/1)
    names = Enum.map(entries, &elem(&1, 0))

    if names != Enum.uniq(names) or "__metadata__" in names do
      raise ArgumentError,
            "expected different names, none of them \"__metadata__\", got: #{inspect(names)}"
    end

    metadata = options[:metadata]

    with {:ok, _written} <-
           Native.await(&Native.write_tensors(path!(path), entries, metadata, &1)) do
      :ok
    end
  end

  @doc false
  # A type as the format names it.
  def dtype(type), do: @dtypes[type]

  @doc false
  # The type of a name of the format.
  def type(dtype), do: @types[dtype]

  defp open(path) do
    path = path!(path)
    Native.await(&Native.open_tensors(path, &1))
  end

  defp path!(path) do
    unless Options.path?(path) do
      raise ArgumentError, "expected a path, got: #{Options.show(path)}"
    end

    Path.expand(path)
  end

  defp tensor(files, known, name, path) do
    with {dtype, shape} <- Map.get(known, name, :missing),
         {:ok, binary} <- files |> Native.read_tensor(name) |> Error.from_native() do
      {:ok, Tensor.new(@types[dtype], List.to_tuple(shape), binary)}
    else
      :missing -> Error.error(:not_found, "there is no tensor `#{name}` in `#{path}`")
      {:error, error} -> {:error, error}
    end
  end

  defp pairs!(tensors) do
    if is_non_struct_map(tensors) or Options.proper_list?(tensors),
      do: tensors,
      else: raise(ArgumentError, "expected tensors by their names, got: #{Options.show(tensors)}")
  end

  defp entry!({name, tensor}) when is_binary(name) or (is_atom(name) and name != nil) do
    name = to_string(name)

    unless String.valid?(name) do
      raise ArgumentError, "expected names in UTF-8, got: #{Options.show(name)}"
    end

    %Tensor{type: type, shape: shape, binary: binary} = Tensor.from_nx(tensor)

    dtype =
      @dtypes[type] ||
        raise ArgumentError,
              "expected a type of the format, got a tensor #{Tensor.title(type, shape)}"

    {name, dtype, Tuple.to_list(shape), binary}
  end

  defp entry!(other) do
    raise ArgumentError, "expected tensors by their names, got: #{Options.show(other)}"
  end

  @doc false
  def check_metadata(metadata) do
    if is_non_struct_map(metadata) and Enum.all?(metadata, &texts?/1),
      do: {:ok, metadata},
      else: {:error, "a map of strings"}
  end

  defp texts?({key, value}), do: text?(key) and text?(value)
  defp text?(value), do: is_binary(value) and String.valid?(value)

  defp as(:bombus), do: & &1

  defp as(:nx) do
    Tensor.nx!()
    &Tensor.to_nx/1
  end
end
