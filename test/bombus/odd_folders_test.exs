defmodule Bombus.OddFoldersTest do
  # Folders as people have them: indexes from before, files in others' places, other formats. Where
  # mlx-lm or transformers load them, so does Bombus; else the error says what to do.
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures}

  @moduletag :tmp_dir
  @tensors "model.safetensors"
  @index "model.safetensors.index.json"
  @ids [1, 2, 3, 4]

  setup %{tmp_dir: dir} do
    %{folder: Fixtures.copy(Fixtures.checkpoint("f32-tied"), dir)}
  end

  defp scores(folder) do
    {:ok, scores} = Bombus.score(Bombus.load_model!(folder), @ids)
    scores
  end

  defp expected(name \\ "f32-tied"), do: scores(Fixtures.checkpoint(name))

  defp refused(folder, reason, words) do
    assert {:error, %Error{} = error} = Bombus.load_model(folder)
    assert error.reason == reason, error.message
    for word <- List.wrap(words), do: assert(error.message =~ word, error.message)
  end

  defp index(folder, weight_map) do
    File.write!(Path.join(folder, @index), JSON.encode!(%{weight_map: weight_map}))
    folder
  end

  defp config(folder, fields),
    do: Fixtures.edit_json(folder, "config.json", &Map.merge(&1, fields))

  describe "an index from before" do
    test "does no harm beside a file that has everything", %{folder: folder} do
      for wrong <- [
            %{"model.norm.weight" => "model-00001-of-00002.safetensors"},
            %{"model.phantom.weight" => @tensors},
            %{"model.norm.weight" => @tensors},
            %{"model.norm.weight" => "../model.safetensors"},
            %{}
          ] do
        assert scores(index(folder, wrong)) == expected()
      end

      for text <- ["", "[]", "<!DOCTYPE html>", ~s({"weight_map": 3})] do
        File.write!(Path.join(folder, @index), text)
        assert scores(folder) == expected()
      end
    end

    test "does none beside shards that have everything", %{tmp_dir: dir} do
      folder = Fixtures.copy(Fixtures.checkpoint("f32-three-shards"), dir)

      for wrong <- [
            %{"model.norm.weight" => "model-00001-of-00009.safetensors"},
            %{"model.norm.weight" => "model-00001-of-00003.safetensors"}
          ] do
        assert scores(index(folder, wrong)) == expected("f32-three-shards")
      end
    end

    test "and shards from before are passed over", %{folder: folder} do
      # As transformers: model.safetensors goes before shards, that are another model's here.
      for shard <- Path.wildcard(Fixtures.checkpoint("f32-three-shards") <> "/model*") do
        File.cp!(shard, Path.join(folder, Path.basename(shard)))
      end

      assert scores(folder) == expected()
    end

    test "a tensor in two files is one", %{tmp_dir: dir} do
      folder = Fixtures.copy(Fixtures.checkpoint("f32-three-shards"), dir)
      File.rm!(Path.join(folder, @index))

      File.cp!(
        Path.join(folder, "model-00001-of-00003.safetensors"),
        Path.join(folder, "model-copy.safetensors")
      )

      assert scores(folder) == expected("f32-three-shards")
    end

    test "names what is really missing", %{folder: folder} do
      File.rm!(Path.join(folder, @tensors))
      index(folder, %{"model.norm.weight" => "model-00001-of-00002.safetensors"})
      refused(folder, :not_found, "model-00001-of-00002.safetensors")
    end
  end

  describe "a quantization that is left from before" do
    test "is passed over where the tensors are dense", %{tmp_dir: dir} do
      for left <- [
            %{"quant_method" => "fp8", "weight_block_size" => [128, 128]},
            %{"quant_method" => "bitsandbytes", "load_in_4bit" => true},
            %{"load_in_8bit" => true},
            %{"quant_method" => "awq", "bits" => 4},
            %{"quant_method" => "compressed-tensors", "format" => "pack-quantized"},
            %{}
          ] do
        folder = Fixtures.copy(Fixtures.checkpoint("f32-dense"), dir)
        config(folder, %{"quantization_config" => left})
        assert scores(folder) == expected("f32-dense")
        assert {:ok, model} = Bombus.load_model(folder, quantization: :int8)
        assert model.quantization.bits == 8
      end

      folder = Fixtures.copy(Fixtures.checkpoint("f32-dense"), dir)
      config(folder, %{"quantization" => %{"bits" => 4, "group_size" => 64}})
      assert Bombus.load_model!(folder).quantization == nil
    end

    test "is named where they are not", %{tmp_dir: dir} do
      weight = "model.layers.0.mlp.up_proj.weight"

      for {method, change} <- [
            {"fp8", &retype(&1, weight, "F8_E4M3")},
            {"bitsandbytes", &retype(&1, weight, "U8")},
            {"bitsandbytes", &[{weight <> ".absmax", "F32", [1], <<0::32>>} | &1]},
            {"hqq", &rename(&1, weight, "model.layers.0.mlp.up_proj.W_q")},
            {"compressed-tensors", &rename(&1, weight, weight <> "_packed")},
            {"torchao", &retype(&1, weight, "I8")}
          ],
          named <- [true, false] do
        folder = Fixtures.copy(Fixtures.checkpoint("f32-dense"), dir)
        if named, do: config(folder, %{"quantization_config" => %{"quant_method" => method}})
        Fixtures.edit_tensor_list(folder, @tensors, change)

        words =
          if named, do: ["quant_method `#{method}`", "mlx_lm.convert"], else: "mlx_lm.convert"

        refused(folder, :unsupported, words)
      end
    end

    test "is named where MLX's own layout is not", %{tmp_dir: dir} do
      folder = Fixtures.copy(Fixtures.checkpoint("f32-tied"), dir)
      fp8 = %{"quant_method" => "fp8", "fmt" => "e4m3"}
      config(folder, %{"quantization" => nil, "quantization_config" => fp8})
      refused(folder, :unsupported, "quant_method `fp8`")
    end

    # Bytes of another type: a quarter of each row where there were four a number.
    defp retype(tensors, name, dtype) do
      Enum.map(tensors, fn
        {^name, "F32", [rows, columns], data} -> {name, dtype, [rows, columns * 4], data}
        other -> other
      end)
    end

    defp rename(tensors, name, new) do
      Enum.map(tensors, fn tensor ->
        if elem(tensor, 0) == name, do: put_elem(tensor, 0, new), else: tensor
      end)
    end
  end

  describe "in a file's place" do
    @pointer "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"

    for {what, bytes, word} <- [
          {"a Git LFS pointer", @pointer, "git lfs pull"},
          {"a login page", "\n<!doctype html>\n<html>", "web page"},
          {"a server's error", ~s({"error": "Repository not found"}), "Repository not found"},
          {"a PyTorch file", "PK\x03\x04\0\0\0\0archive/data.pkl", "save_pretrained"},
          {"a pickle", <<0x80, 2, ?}, ?q, 0::64>>, "pickle"},
          {"a GGUF file", "GGUF\x03\0\0\0\0\0\0\0", "GGUF"},
          {"gzip", <<0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0>>, "unpack"},
          {"nothing", "", "empty"},
          {"zeros", <<0::4096>>, "zeros"}
        ] do
      test "#{what} is named", %{folder: folder, tmp_dir: dir} do
        for {name, reason} <- [{@tensors, :bad_checkpoint}, {"config.json", :bad_config}] do
          broken = Fixtures.copy(folder, dir)
          File.write!(Path.join(broken, name), unquote(bytes))
          refused(broken, reason, [name, unquote(word)])
        end
      end
    end

    test "text is quoted", %{folder: folder} do
      File.write!(Path.join(folder, @tensors), "Entry not found")
      refused(folder, :bad_checkpoint, "Entry not found")
    end

    test "a pointer is named by adapters and tokenizers too", %{tmp_dir: dir} do
      for name <- ["adapters.safetensors", "adapter_config.json"] do
        adapter = Fixtures.copy(Fixtures.adapter("f32-tied", "last-qv"), dir)
        File.write!(Path.join(adapter, name), @pointer)
        assert {:error, %Error{message: message}} = Bombus.load_adapter(adapter)
        assert message =~ name
        assert message =~ "git lfs pull"
      end

      for name <- ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] do
        demo = Fixtures.copy(Application.app_dir(:bombus, "priv/models/demo"), dir)
        File.write!(Path.join(demo, name), @pointer)
        assert {:error, %Error{message: message}} = Bombus.load_tokenizer(demo)
        assert message =~ name
        assert message =~ "git lfs pull"
      end
    end
  end

  describe "what is no regular file" do
    setup %{tmp_dir: dir} do
      adapter = Fixtures.copy(Fixtures.adapter("f32-tied", "last-qv"), dir)

      loads = [
        {:model, &Bombus.load_model/1, ["config.json", "generation_config.json", @tensors]},
        {:model, &Bombus.load_model/1, [@index]},
        {:adapter, &Bombus.load_adapter/1, ["adapter_config.json", "adapters.safetensors"]},
        {:tokenizer, &Bombus.load_tokenizer/1,
         ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]}
      ]

      demo = Fixtures.copy(Application.app_dir(:bombus, "priv/models/demo"), dir)
      %{folders: %{adapter: adapter, tokenizer: demo}, loads: loads}
    end

    for {what, word} <- [fifo: "FIFO", zero: "device", folder: "folder", sparse: ""] do
      @tag timeout: 20_000
      test "#{what} is refused", %{folder: folder, folders: folders, loads: loads, tmp_dir: dir} do
        for {kind, load, names} <- loads, name <- names do
          broken = Fixtures.copy(Map.get(folders, kind, folder), dir)
          path = Path.join(broken, name)
          # The index counts where nothing else does.
          if name == @index, do: File.rm!(Path.join(broken, @tensors))
          if name == @index, do: File.write!(Path.join(broken, "model-1.safetensors"), "")
          File.rm(path)
          put(unquote(what), path)
          assert {:error, %Error{} = error} = load.(broken)
          if name != @index, do: assert(error.message =~ name)
          if name != @index, do: assert(error.message =~ unquote(word))
        end
      end
    end

    defp put(:fifo, path), do: {_output, 0} = System.cmd("mkfifo", [path])
    defp put(:zero, path), do: File.ln_s!("/dev/zero", path)
    defp put(:folder, path), do: File.mkdir_p!(path)
    defp put(:sparse, path), do: {_out, 0} = System.cmd("truncate", ["-s", "16G", path])
  end

  describe "other formats" do
    for {names, words} <- [
          {["pytorch_model.bin"], ["pytorch_model.bin", "save_pretrained"]},
          {["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
           "save_pretrained"},
          {["qwen3.Q4_K_M.gguf"], ["qwen3.Q4_K_M.gguf", "llama.cpp"]},
          {["weights.npz"], ["weights.npz", "mlx_lm.convert"]},
          {["consolidated.00.pth"], ["consolidated.00.pth", "makers"]},
          {["tf_model.h5"], "TensorFlow"},
          {["flax_model.msgpack"], "Flax"},
          {["model.onnx"], "compiled"},
          {["qwen.safetensors"], ["qwen.safetensors", "rename"]},
          {["model.safetensors.incomplete"], "has not ended"},
          {["adapter_model.safetensors", "adapter_config.json"], "load_adapter"}
        ] do
      test "#{hd(names)} is named, with or without a configuration", %{folder: folder} do
        File.rm!(Path.join(folder, @tensors))
        for name <- unquote(names), do: File.write!(Path.join(folder, name), "x")
        refused(folder, :not_found, [@tensors | List.wrap(unquote(words))])
        File.rm!(Path.join(folder, "config.json"))
        refused(folder, :not_found, ["config.json" | List.wrap(unquote(words))])
      end
    end
  end

  describe "numbers of config.json" do
    @tag timeout: 20_000
    test "allocate no more than the files hold", %{tmp_dir: dir} do
      most = 0x7FFFFFFF

      for name <- ["f32-dense", "f32-tied"],
          {field, word} <- [
            {"num_hidden_layers", "at most 4096 layers"},
            {"num_attention_heads", "head"},
            {"head_dim", "head_dim"},
            {"hidden_size", "shape"},
            {"intermediate_size", "shape"},
            {"vocab_size", "shape"}
          ],
          quantization <- [nil, :int4] do
        folder = Fixtures.copy(Fixtures.checkpoint(name), dir)
        config(folder, %{field => most})
        assert {:error, %Error{} = error} = Bombus.load_model(folder, quantization: quantization)
        assert error.reason in [:bad_config, :bad_checkpoint]
        assert error.message =~ word, error.message
      end
    end

    @tag :capture_log
    test "an eos id beyond the vocabulary ends nothing", %{folder: folder} do
      for ids <- [[256], 4_294_967_295, [-1, 1.0e30, 99_999], 18_446_744_073_709_551_616] do
        config(folder, %{"eos_token_id" => ids})
        serving = Bombus.Serving.new(Bombus.load_model!(folder), nil)

        assert %{results: [%{finish_reason: :length}]} =
                 Bombus.Serving.run(serving, %{
                   token_ids: [1, 2],
                   max_new_tokens: 3,
                   min_new_tokens: 2
                 })
      end
    end

    test "a generation_config.json that is no JSON says nothing, as in mlx-lm", %{folder: folder} do
      for text <- ["", "{", "<html>"] do
        File.write!(Path.join(folder, "generation_config.json"), text)
        assert scores(folder) == expected()
      end
    end

    test "NaN and Infinity are read as Python writes them", %{folder: folder} do
      path = Path.join(folder, "config.json")
      text = path |> File.read!() |> String.replace_prefix("{", ~s({"a": NaN, "b": [-Infinity],))
      File.write!(path, text)
      File.write!(Path.join(folder, "generation_config.json"), ~s({"temperature": Infinity}))
      assert scores(folder) == expected()
    end
  end
end
